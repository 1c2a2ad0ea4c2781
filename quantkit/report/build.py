"""The report put together: what is known already is taken over, the rest is measured, and every result is saved as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantkit.errors import UsageError
from quantkit.evaluation import results
from quantkit.models.compare import Progress
from quantkit.report.describe import describe
from quantkit.report.measure import MeasureOptions, measure_speed, measure_tasks, measure_text
from quantkit.report.schema import CheckpointResult, Report

Told = Callable[[str], None]


def build_report(
    sources: Sequence[str], baseline: str, options: MeasureOptions, *, command: str, known: Sequence[Report] = (),
    save: Callable[[Report], None] | None = None, told: Told | None = None, progress: Progress | None = None,
) -> Report:  # fmt: skip
    """Describe and measure checkpoints of one model.

    Args:
        sources, baseline: folders, hub ids or "reference".
        known: earlier reports: their checkpoints are taken over, by fingerprint, and what was measured of them as it is asked for now.
        save: called with the report after every measurement, so that nothing is lost where the next one fails.
        told: what is done next, in words.

    Raises:
        UsageError: two checkpoints go by one name, or there is none.
        QuantkitError: a checkpoint cannot be opened or measured; what was found before is saved.
    """
    code = {"trust_remote_code": options.trust_remote_code}
    earlier = next((report.baseline for report in known if report.baseline.source == baseline), None)
    base = earlier if earlier is not None and not sources else describe(baseline, **code)  # reports may come from other machines
    found = {each.name: each for each in (_with_known(describe(source, **code), known, options) for source in sources)}
    if len(found) < len(sources):
        raise UsageError("two checkpoints go by the same name; give folders of different names")
    for report in known:
        for each in report.checkpoints:
            if all(each.fingerprint != other.fingerprint for other in found.values()):
                found.setdefault(each.name, each)
    if not found:
        raise UsageError("there is no checkpoint to report on; name folders, or earlier reports")
    own_speed = next((report.baseline.speed for report in known if report.baseline.fingerprint == base.fingerprint), None)
    base = base.model_copy(update={"speed": own_speed})

    def report() -> Report:
        return Report(date=results.now(), command=command, versions=results.versions(), baseline=base, checkpoints=list(found.values()))

    def keep(name: str, **update: object) -> None:
        found[name] = found[name].model_copy(update=update)
        if save is not None:
            save(report())

    for name, source in zip([*found][: len(sources)], sources, strict=True):
        for kind in options.kinds:
            if getattr(found[name], kind) is not None:
                continue
            if told is not None:
                told(f"{name}: {kind}")
            if kind == "text":
                keep(name, text=measure_text(source, baseline, options, command, progress))
            elif kind == "tasks":
                keep(name, tasks=measure_tasks(source, baseline, options, command))
            else:
                own, other = measure_speed(source, baseline, options, command)
                base = base.model_copy(update={"speed": other})
                keep(name, speed=own)
    return report()


def _with_known(checkpoint: CheckpointResult, known: Sequence[Report], options: MeasureOptions) -> CheckpointResult:
    """With what earlier reports have of the same weights, measured as now by the same version."""
    for report in known:
        for each in report.checkpoints:
            if each.fingerprint == checkpoint.fingerprint and report.versions == results.versions():
                return checkpoint.model_copy(update=_as_asked(each, options))
    return checkpoint


def _as_asked(each: CheckpointResult, options: MeasureOptions) -> dict[str, object]:
    kept: dict[str, object] = {}
    if each.text is not None and options.text is None and options.seq_len in (None, each.text.seq_len):
        kept["text"] = each.text
    if each.tasks is not None and each.tasks.suite == options.suite and each.tasks.settings.mode == options.mode:
        kept["tasks"] = each.tasks
    if each.speed is not None and each.speed.mode == options.mode and [load.num_requests for load in each.speed.loads] == list(options.requests):
        kept["speed"] = each.speed
    return kept
