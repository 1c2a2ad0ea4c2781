"""`quantkit eval --tasks`: what lm-eval's tasks say of a model and its baseline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.command_line import command_line
from quantkit.cli.engine_options import SCORING
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from quantkit.evaluation.results import ScoredModel, ScoreReport, TaskScore
    from quantkit.evaluation.suite import SuiteTask

_LIBRARIES = frozenset({"lm_eval", "scipy"})
_OPTIONS = (
    click.option("--tasks", metavar="LIST", help="lm-eval's tasks and groups, separated by commas, instead of metrics."),
    click.option("--suite", metavar="NAME", help="Tasks with their shots and limits: quick, standard, full, or a YAML file."),
    click.option("--limit", type=click.IntRange(1), help="Documents of each task, the first ones.  [default: all, or as the suite says]"),
    click.option("--num-fewshot", type=click.IntRange(0), help="Examples before each question, of all tasks.  [default: as each task says]"),
    click.option("--data-dir", type=click.Path(path_type=Path), help="Local files: gsm8k/{train,test}.jsonl, mmlu/{dev,test}/*.csv."),
    click.option("--partial-data", "is_partial_data", is_flag=True, help="Take files of --data-dir that hold a part of the task."),
    click.option("--chat", is_flag=True, help="Put prompts into the model's chat template."),
    *SCORING,
    click.option("--threads", type=click.IntRange(1), help="Threads on a CPU; its physical cores by default."),
    click.option("--output", type=click.Path(path_type=Path), help="Write the result to a JSON file too; evals/schemas/scores.json describes it."),
    click.option("--cache-dir", type=click.Path(path_type=Path), help="Where answers are kept.  [default: the user's cache]"),
    click.option("--fresh", "is_fresh", is_flag=True, help="Ask everything anew; kept answers are dropped."),
    click.option("--run-unsafe-code", "runs_unsafe_code", is_flag=True, help="Take tasks that run what the model writes, such as humaneval."),
)


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run_tasks(model: str, baseline: str | None, tasks: str | None, suite: str | None, as_json: bool, options: dict[str, Any]) -> None:
    if tasks is not None and suite is not None:
        raise UsageError("give --tasks or --suite, not both")
    output, threads = options.pop("output"), options.pop("threads")
    numbers = {name: options.pop(name) for name in ("num_fewshot", "limit")}
    with _needs_lm_eval():
        asked = tuple(task.changed(**numbers) for task in _asked(tasks, suite))
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        from quantkit.evaluation.scoring import ScoringOptions, score

        report = score(model, asked, baseline=baseline, options=ScoringOptions(**options), suite=suite, command=command_line())
    if output is not None:
        report.write(output)
    if as_json:
        click.echo(report.to_json(), nl=False)
    else:
        _show(report)
    if output is not None:
        click.echo(f"written to {output}", err=True)


@contextmanager
def _needs_lm_eval() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _LIBRARIES:
            raise
        raise UsageError(f"tasks need {error.name}: pip install 'quantkit[eval]'") from error


def _asked(tasks: str | None, suite: str | None) -> tuple[SuiteTask, ...]:
    from quantkit.evaluation.suite import Suite, SuiteTask

    if suite is not None:
        return Suite.load(suite).tasks
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task; an example is --tasks reference_mmlu,reference_gsm8k")
    return tuple(SuiteTask(task=name) for name in names)


def _show(report: ScoreReport) -> None:
    from quantkit.cli.tables import results_console

    results_console().print(_comparisons(report.scores) if report.baseline else _scores(report.scores))
    for what, scored in (("baseline", report.baseline), ("model", report.model)):
        if scored is not None:
            click.echo(f"{what}: {_about(scored)}", err=True)


def _about(scored: ScoredModel) -> str:
    cut = f"; {scored.num_cut} were longer than the context and lost their beginning" if scored.num_cut else ""
    known = f", {scored.num_known} of them answered before" if scored.num_known else ""
    return f"{scored.source}, {scored.num_requests} requests{known}, {scored.seconds:.1f} s{cut}"


def _comparisons(scores: list[TaskScore]) -> Table:
    from quantkit.cli.tables import plain_table

    columns = ("task", "metric", "shots", "n", "baseline", "quantized", "difference", "recovery", "detectable", "verdict")
    table = plain_table(*columns, right=("shots", "n", "baseline", "quantized", "difference", "recovery", "detectable"))
    for row in scores:
        base, found = row.baseline, row.comparison
        assert base is not None
        head = (_name(row), _metric(row), _shots(row), str(row.num_documents), _value(row, base.value), _value(row, row.score.value))
        if found is None:
            table.add_row(*head, f"{row.score.value - base.value:+.4g}", "", "", "not a mean over documents: not compared")
            continue
        difference = f"{100 * found.difference:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"
        table.add_row(*head, difference, _recovery(found), f"{100 * found.detectable:.1f}", found.verdict)
    return table


def _scores(scores: list[TaskScore]) -> Table:
    from quantkit.cli.tables import plain_table

    table = plain_table("task", "metric", "shots", "n", "score", "± standard error", right=("shots", "n", "score", "± standard error"))
    for row in scores:
        error = row.score.standard_error
        shown = "" if error is None else _value(row, error)
        table.add_row(_name(row), _metric(row), _shots(row), str(row.num_documents), _value(row, row.score.value), shown)
    return table


def _name(row: TaskScore) -> str:
    return row.task if row.group is None else f"  {row.task.removeprefix(f'{row.group}::')}"


def _metric(row: TaskScore) -> str:
    return row.metric if row.filter == "none" else f"{row.metric}, {row.filter}"


def _shots(row: TaskScore) -> str:
    return "" if row.num_fewshot is None else str(row.num_fewshot)


def _value(row: TaskScore, value: float) -> str:
    """Points of a hundred for shares, other scores as they are."""
    return f"{100 * value:.1f}" if row.higher_is_better else f"{value:.4f}"


def _recovery(found: Any) -> str:
    if found.recovery is None:
        return "-"
    return f"{100 * found.recovery:.1f}% ({100 * found.recovery_low:.1f} to {100 * found.recovery_high:.1f})"
