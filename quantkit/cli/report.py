"""`quantkit report`: what was found of any number of checkpoints on one page, and whether it is still what it was."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.command_line import command_line
from quantkit.cli.counts import counts
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.report.check import CheckFile, Finding
    from quantkit.report.measure import MeasureOptions
    from quantkit.report.schema import Report

_KINDS = ("text", "tasks", "speed")
_OF_THE_FILE = ("text", "seq_len", "max_tokens", "suite", "requests", "mode", "cache_dir", "is_fresh")
_LIBRARIES = {"lm_eval": "report", "scipy": "report", "matplotlib": "report", "tensorboard": "track", "wandb": "track"}


def _kinds(_: click.Context, __: click.Parameter, value: str) -> tuple[str, ...]:
    from quantkit.errors import did_you_mean

    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if names == ("none",):
        return ()
    for name in names:
        if name not in _KINDS:
            raise UsageError(f"--measure {name!r} is not known; {did_you_mean(name, (*_KINDS, 'none'))}")
    return names


@click.command()
@click.argument("inputs", nargs=-1)
@click.option("--baseline", metavar="SRC", help="The original of all of them.  [default: that of --check, or of the first earlier report]")
@click.option("--output", "-o", "folder", type=click.Path(path_type=Path, file_okay=False), default="report", show_default=True,
              help="Folder to write.")
@click.option("--measure", "kinds", default="text,tasks,speed", show_default=True, callback=_kinds,
              help="What is measured where it is not known: any of text, tasks, speed; or none.")
@click.option("--text", type=click.Path(path_type=Path), help="A text file, or .jsonl with a `text` a line.  [default: prose of the reference model]")
@click.option("--seq-len", type=click.IntRange(2), help="Tokens a row of text.  [default: 512, or the model's context if that is less]")
@click.option("--max-tokens", type=click.IntRange(0), default=65_536, show_default=True, help="Tokens of text to count; 0 for all of it.")
@click.option("--suite", help="Tasks to answer: quick, standard, full, or a YAML file.  [default: quick, or that of --check]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Local files of MMLU and GSM8K, as `quantkit eval` takes them.")
@click.option("--requests", callback=counts, default="1,4,16", show_default=True, help="Requests at once, for each point of load.")
@click.option("--mode", type=click.Choice(["fast", "exact", "int8"]), default="fast", show_default=True, help="Of the runtime, for tasks and speed.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads on a CPU; its physical cores by default.")
@click.option("--check", "check_file", type=click.Path(path_type=Path),
              help="Make the checkpoints that this file names and fail where they are worse than it says.")
@click.option("--update", is_flag=True, help="Write what was found into the file of --check instead of failing.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where answers and states are kept.  [default: the user's cache]")
@click.option("--fresh", "is_fresh", is_flag=True, help="Measure everything anew.")
@click.option("--tensorboard", type=click.Path(path_type=Path, file_okay=False), help="Folder for TensorBoard's files.")
@click.option("--wandb", metavar="PROJECT", help="Log a run for each checkpoint to Weights & Biases (WANDB_MODE=offline keeps them here).")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the model brings along.")
@click.pass_context
def report(
    ctx: click.Context, inputs: tuple[str, ...], baseline: str | None, folder: Path, check_file: Path | None, update: bool,
    tensorboard: Path | None, wandb: str | None, threads: int | None, suite: str | None, requests: list[int], **options: Any,
) -> None:  # fmt: skip
    """Report on checkpoints of one model: size, loss, answers, speed.

    INPUTS are checkpoints (folders, hub ids), report.json files of earlier reports, or JSON files of `quantkit eval --tasks`. What is not known of a
    checkpoint is measured against the baseline; what an earlier run into the same folder found is taken over, so that a stopped run goes on. The
    folder gets report.html, report.md and report.json, and with --check report.xml for JUnit.

    \b
    quantkit report out-gptq out-awq --baseline org/name
    quantkit report out --baseline org/name --measure text --text wiki.test.raw
    quantkit report laptop/report.json server/report.json -o both --measure none
    quantkit report --check evals/baselines/reference.json
    """
    try:
        from quantkit.report.check import CheckFile
        from quantkit.report.measure import MeasureOptions

        _require_libraries(tensorboard=tensorboard is not None, wandb=wandb is not None)
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    if update and check_file is None:
        raise UsageError("--update writes into the file of --check; name that too")
    if check_file is not None and inputs:
        raise UsageError("--check makes the checkpoints that its file names; leave the others out")
    expected = CheckFile.read(check_file) if check_file is not None else None
    options |= {"suite": suite or "quick", "requests": tuple(sorted(set(requests))), "max_tokens": options["max_tokens"] or None}
    if expected is not None:
        _require_said_by_the_file(ctx)
        if not expected.has_figures and not update:
            raise UsageError(f"{check_file} has no figures to check against; --update measures them and writes them into it")
        options |= {name: getattr(expected, name) for name in ("seq_len", "max_tokens", "suite", "requests", "mode")}
        options |= {"text": Path(expected.text) if expected.text is not None else None, "cache_dir": folder / "cache"}
        shutil.rmtree(folder / "cache", ignore_errors=True)  # answers of an earlier run would hide a runtime that fails now
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    settings = MeasureOptions(**options)
    try:
        found = _collected(inputs, baseline, folder, settings, expected)
        findings = _written(found, folder, expected)
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    if tensorboard is not None or wandb is not None:
        from quantkit.report.trackers import to_tensorboard, to_wandb

        if tensorboard is not None:
            to_tensorboard(found, tensorboard)
        if wandb is not None:
            to_wandb(found, wandb, folder)
    if expected is None or findings is None:
        return
    if update and check_file is not None:
        from quantkit.report.check import updated
        from quantkit.report.measure import provenance

        updated(expected, found, provenance(command_line())).write(check_file)
        click.echo(f"{check_file} has these figures now", err=True)
    elif any(each.has_failed for each in findings):
        sys.exit(1)


def _require_said_by_the_file(ctx: click.Context) -> None:
    """Raises UsageError where the command line says what a check file says."""
    for option in ctx.command.params:
        if option.name in _OF_THE_FILE and ctx.get_parameter_source(option.name) == click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{option.opts[0]} is said by the file of --check; change it there, and --update")


def _collected(
    inputs: tuple[str, ...], baseline: str | None, folder: Path, settings: MeasureOptions, expected: CheckFile | None
) -> Report:  # fmt: skip
    from quantkit.cli.block_progress import block_progress
    from quantkit.evaluation.document import read_any
    from quantkit.evaluation.results import ScoreReport
    from quantkit.report.build import build_report
    from quantkit.report.make import make_checkpoints
    from quantkit.report.schema import Report

    def tell(what: str) -> None:
        click.echo(what, err=True)

    files = [Path(each) for each in inputs if each.endswith(".json")]
    read = [read_any(path, Report, ScoreReport) for path in files]
    earlier, scores = [each for each in read if isinstance(each, Report)], [each for each in read if isinstance(each, ScoreReport)]
    sources = [each for each in inputs if not each.endswith(".json")]
    code = {"device": settings.device, "trust_remote_code": settings.trust_remote_code}
    only: dict[str, tuple[str, ...]] = {}
    if expected is not None:
        baseline, sources = baseline or expected.source, make_checkpoints(expected, folder / "checkpoints", told=tell, **code)
        only = {source: each.measured for source, each in zip(sources, expected.checkpoints, strict=True)}
    baselines = [*(each.baseline.source for each in earlier), *(each.baseline.source for each in scores if each.baseline is not None)]
    baseline = baseline or next(iter(baselines), None)
    if baseline is None:
        raise UsageError("name the original with --baseline; every figure is beside its own")
    own = folder / "report.json"
    known = [*earlier, *([Report.read(own)] if own.is_file() and own not in files and expected is None and not settings.is_fresh else [])]
    with block_progress() as progress:
        return build_report(
            sources, baseline, settings, command=command_line(), known=known, scores=scores, only=only, save=lambda found: found.write(own),
            told=tell, progress=progress,
        )  # fmt: skip


def _written(found: Report, folder: Path, expected: CheckFile | None) -> list[Finding] | None:
    """Every form of the report; and the checkpoints and what was found, on stdout."""
    from quantkit.cli.tables import plain_table, results_console
    from quantkit.evaluation.document import write_text
    from quantkit.report import words
    from quantkit.report.check import check
    from quantkit.report.junit import junit
    from quantkit.report.markdown import markdown
    from quantkit.report.page import page

    findings = check(found, expected) if expected is not None else None
    found.write(folder / "report.json")
    write_text(folder / "report.md", markdown(found, findings))
    write_text(folder / "report.html", page(found, findings))
    console = results_console()
    for heads, rows in [words.overview(found), *([words.findings_table(findings)] if findings else [])]:
        shown = plain_table(*heads)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        console.print()
    if findings is not None:
        write_text(folder / "report.xml", junit(findings))
        if findings:
            console.print(words.verdict(findings))
    click.echo(f"written to {folder}: report.html, report.md, report.json{', report.xml' if findings is not None else ''}", err=True)
    return findings


def _require_libraries(*, tensorboard: bool, wandb: bool) -> None:
    """Before anything is measured. Raises ModuleNotFoundError."""
    import matplotlib  # noqa: F401

    if tensorboard:
        import tensorboard as _  # noqa: F401
    if wandb:
        import wandb as __  # noqa: F401


def _missing(error: ModuleNotFoundError) -> Exception:
    extra = _LIBRARIES.get((error.name or "").partition(".")[0])
    return error if extra is None else UsageError(f"reports need {error.name}: pip install 'quantkit[{extra}]'")
