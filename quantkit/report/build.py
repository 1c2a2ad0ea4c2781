"""The report put together: what is known already is taken over, the rest is measured, and every result is saved as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantkit.checkpoint.source import resolve
from quantkit.errors import UsageError
from quantkit.evaluation import results
from quantkit.evaluation.fingerprint import model_fingerprint
from quantkit.evaluation.results import ScoreReport
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.models.compare import Progress
from quantkit.report.describe import describe
from quantkit.report.measure import MeasureOptions, answers_of, measure_speed, measure_tasks, measure_text, settings_key
from quantkit.report.schema import KINDS, CheckpointResult, Report, TaskResult

Told = Callable[[str], None]


def build_report(
    sources: Sequence[str], baseline: str, options: MeasureOptions, *, command: str, known: Sequence[Report] = (), scores: Sequence[ScoreReport] = (),
    only: Mapping[str, Sequence[str]] | None = None, save: Callable[[Report], None] | None = None, told: Told | None = None,
    progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Describe and measure checkpoints of one model.

    Args:
        sources, baseline: folders, hub ids or "reference".
        known: earlier reports beside the same baseline. Their checkpoints are taken over; a result is, where it is not asked for or was found by the
            same settings, the newest where there are several.
        scores: results of `quantkit eval --tasks` against the same baseline: their models are reported on too, with these answers.
        only: the kinds to measure of some of the sources; of others all that is asked for.
        save: called with the report at first and after every measurement, so that nothing is lost where the next one fails.
        told: what is done next, in words.

    Raises:
        UsageError: two checkpoints go by one name, an earlier report is beside another baseline, or there is no checkpoint.
        QuantkitError: a checkpoint cannot be opened or measured; what was found before is saved.
    """
    code = {"trust_remote_code": options.trust_remote_code}
    base = next((report.baseline for report in known if report.baseline.source == baseline and not sources and not scores), None)
    base = base or describe(baseline, **code)  # reports may come from machines that had it
    for report in known:
        if report.baseline.fingerprint != base.fingerprint:
            reason = f"an earlier report is beside {report.baseline.source}, whose weights are others than those of {baseline}"
            raise UsageError(f"{reason}; give another --output, or leave that report out")
    sources = list(dict.fromkeys([*sources, *(each.model.source for each in scores)]))
    if options.kinds:
        for source in sources:
            OpenedCheckpoint.of(resolve(source, **code))  # before anything is measured, all can be
    found = _named([describe(source, **code) for source in sources], [_bare(each) for report in known for each in report.checkpoints])
    for name, each in found.items():
        found[name] = each.model_copy(update=_known_of(each, base, known, options))
    for each in scores:
        own = next(checkpoint for checkpoint in found.values() if checkpoint.source == each.model.source)
        found[own.name] = own.model_copy(update={"tasks": _answers(each, baseline)})

    def report_now() -> Report:
        return Report(date=results.now(), command=command, versions=results.versions(), baseline=base, checkpoints=list(found.values()))

    def keep(name: str, **update: object) -> None:
        found[name] = found[name].model_copy(update=update)
        if save is not None:
            save(report_now())

    if save is not None:
        save(report_now())  # a place that cannot be written is found before any work
    for name in [each.name for each in found.values() if each.source in sources]:
        source = found[name].source
        for kind in options.kinds:
            if getattr(found[name], kind) is not None or kind not in (only or {}).get(source, KINDS):
                continue
            if told is not None:
                told(f"{name}: {kind}")
            if kind == "text":
                keep(name, text=measure_text(source, baseline, options, command, base.fingerprint, progress))
            elif kind == "tasks":
                keep(name, tasks=measure_tasks(source, baseline, options, command, base.fingerprint))
            else:
                keep(name, speed=measure_speed(source, baseline, options, command, base.fingerprint))
    return report_now()


def _named(here: Sequence[CheckpointResult], earlier: Sequence[CheckpointResult]) -> dict[str, CheckpointResult]:
    """By name; of earlier ones those that are not here too."""
    found: dict[str, CheckpointResult] = {}
    for number, each in enumerate([*here, *earlier]):
        if number >= len(here) and any(each.fingerprint == other.fingerprint for other in found.values()):
            continue
        if each.name in found:
            both = f"{found[each.name].source} and {each.source}"
            raise UsageError(f"two checkpoints go by the name {each.name!r}: {both}; give them folders of other names")
        found[each.name] = each
    if not found:
        raise UsageError("there is no checkpoint to report on; name folders, or earlier reports")
    return found


def _bare(checkpoint: CheckpointResult) -> CheckpointResult:
    return checkpoint.model_copy(update=dict.fromkeys(KINDS))


def _known_of(checkpoint: CheckpointResult, base: CheckpointResult, known: Sequence[Report], options: MeasureOptions) -> dict[str, object]:
    """Of each kind, what is known of the same weights and, where that kind is asked for, was found in the way it is asked for now."""
    found: dict[str, object] = {}
    for kind in KINDS:
        earlier = [getattr(each, kind) for report in known for each in report.checkpoints if each.fingerprint == checkpoint.fingerprint]
        if kind in options.kinds:
            key = settings_key(kind, options, base.fingerprint)
            earlier = [each for each in earlier if each is not None and each.key == key]
        found[kind] = _newest(earlier)
    return found


def _newest(found: Iterable[Any]) -> Any:
    """The result that was made last; None of none."""
    return max((each for each in found if each is not None), key=lambda each: each.made.date, default=None)


def _answers(scores: ScoreReport, baseline: str) -> TaskResult:
    """Raises UsageError: they are of other weights than the checkpoint has now, or beside another baseline."""
    for model, source in ((scores.model, scores.model.source), (scores.baseline, baseline)):
        if model is None or model.fingerprint != model_fingerprint(resolve(source).folder):
            raise UsageError(f"the scores of {scores.model.source} were made with other weights than {source} has; run the evaluation again")
    return answers_of(scores, key="")
