"""How a conversion looks in a terminal: the bar while it runs, the plan before, the account after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from quantkit.checkpoint.weight_files import some
from quantkit.cli.allocation import allocation_line, chosen, show_allocation
from quantkit.cli.plan_json import planned_checkpoint
from quantkit.cli.tables import results_console
from quantkit.conversion.prepare import Prepared
from quantkit.conversion.report import ConversionReport, LayerResult, bits_in_words, figure
from quantkit.formats.engines import Verdict, verdicts
from quantkit.formats.kv_scales import KV_CACHES, in_words
from quantkit.formats.summary import summarize

console = Console(stderr=True, highlight=False, markup=False)


class ConvertProgress:
    """A listener with a bar of blocks: the last layer and its error, blocks done, time left. Where stderr is no terminal, a line a block."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(elapsed_when_finished=False), console=console,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("preparing", total=None, detail="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def started(self, num_blocks: int) -> None:
        self._bar.update(self._task, total=num_blocks, description="copying unquantized tensors")

    def stage(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def layer(self, result: LayerResult) -> None:
        description = "quantizing" if result.lossless is None else "moving"
        self._bar.update(self._task, description=description, detail=f"{result.name}  error {result.error:.2e}")

    def block(self, index: int, results: list[LayerResult], *, resumed: bool) -> None:
        mean = f"  mean error {sum(r.error for r in results) / len(results):.2e}" if results else ""
        detail = f"block {index}{mean}{'  (done before)' if resumed else ''}"
        self._bar.update(self._task, completed=index + 1, detail=detail)
        if not self._bar.console.is_terminal:
            console.print(detail)


def show_plan(prepared: Prepared) -> None:
    """What a dry run prints."""
    plan, results = prepared.plan, results_console()
    table = Table(title=f"{prepared.origin.name}{_by(prepared.recipe.name if prepared.recipe else None)} to {plan.format.name}", title_justify="left")
    for column in ("scheme", "layers", "weights"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    kinds = Counter(layer.scheme.name for layer in plan.layers.values())
    weights: Counter[str] = Counter()
    for layer in plan.layers.values():
        weights[layer.scheme.name] += layer.linear.shape[0] * layer.linear.shape[1]
    for name, count in kinds.items():
        table.add_row(name, f"{count:,}", f"{weights[name]:,}")
    if plan.layers:
        results.print(table)
    _show_moves(results, prepared)
    show_allocation(results, prepared)
    _show_notes(results, {f"{name}: {layer.note}" for name, layer in plan.layers.items() if layer.note}, plan.left_alone)
    of_layers = f"{plan.linear_bpw:.3f} bits per weight in quantized layers, {plan.file_bpw:.3f}"
    bits = of_layers if plan.layers else f"{plan.file_bpw:.3f} bits per weight"
    results.print(f"size {_megabytes(plan.bytes_before)} -> {_megabytes(plan.bytes_after)}, {bits} over the file")
    if plan.kv_cache is not None:
        results.print(f"KV cache: {in_words(KV_CACHES[plan.kv_cache.name])}, for {len(plan.kv_cache.layers)} layers")
    data = prepared.options.calibration
    if prepared.needs_measurement:
        results.print("a measurement is needed before schemes can be chosen; layers and size above are a stand-in for the choice")
    calibrated = f"would be calibrated on up to {data.num_samples} rows of {data.source or 'the built-in mix'}"
    results.print(calibrated if plan.needs_calibration or prepared.needs_measurement else "needs no calibration data")
    for note in plan.notes:
        results.print(f"note: {note}")
    if not prepared.needs_measurement:
        _show_engines(results, verdicts(planned_checkpoint(prepared)), "would load")


def _by(recipe: str | None) -> str:
    return f" by {recipe}" if recipe else ""


def _show_moves(results: Console, prepared: Prepared) -> None:
    """What becomes of a source that is quantized already."""
    plan, source = prepared.plan, prepared.source
    if source.format is None or prepared.recipe is not None:
        return
    if not plan.keeps_codes:
        results.print(f"{len(source.schemes)} layers of {source.format.name} are decoded, and rounded to bfloat16")
        return
    kept = sum(layer.kept is not None for layer in plan.layers.values())
    results.print(f"{kept} of {len(plan.layers)} layers of {source.format.name} go over as they are: the same codes, scales and zero points")


def show_report(report: ConversionReport) -> None:
    """The table at the end of a conversion."""
    results = results_console()
    table = Table(title=f"{report.output}: {report.source}{_by(report.recipe)} as {report.format}", title_justify="left", show_header=False)
    ratio = report.bytes_before / max(1, report.bytes_after)
    size = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
    table.add_row("size", f"{_megabytes(report.bytes_before)} -> {_megabytes(report.bytes_after)} ({size})")
    table.add_row("bits per weight", bits_in_words(report.linear_bpw, report.file_bpw))
    table.add_row("time", f"{report.seconds:.1f} s")
    table.add_row("peak memory", _megabytes(report.peak_memory_bytes))
    if report.losslessness:
        table.add_row("against the source", report.losslessness)
    elif worst := report.worst:
        table.add_row("layer error", f"mean {report.mean_error:.2e}, worst {worst.error:.2e} ({worst.name})")
    if report.kv_cache:
        table.add_row("KV cache", report.kv_cache)
    if report.allocation:
        table.add_row("allocation", allocation_line(report.allocation))
    if report.divergence:
        d = report.divergence
        table.add_row("perplexity", f"{figure(d['ppl_baseline'])} -> {figure(d['ppl_quantized'])} ({d['num_tokens']} held-out calibration tokens)")
        table.add_row("KL divergence", f"{figure(d['kl_mean'], 5)} ± {figure(d['kl_se'], 5)} nats; same top token {100 * d['top1']:.2f}%")
    elif report.recipe:
        table.add_row("perplexity, KL", f"not measured; quantkit eval {quote(report.output)} --baseline {quote(report.source)}")
    results.print(table)
    if report.allocation:
        results.print(chosen(report.allocation["units"]))
    if report.calibration:
        results.print(report.calibration)
    if report.experts:
        results.print(report.experts["summary"])
    for note in report.notes:
        results.print(f"note: {note}")
    _show_notes(results, {f"{layer.name}: {layer.note}" for layer in report.layers if layer.note}, report.left_alone)
    if report.left_behind:
        results.print(f"left behind (other weights, or replaced by the output's own): {some(report.left_behind)}")
    _show_engines(results, summarize(Path(report.output)).verdicts, "loads")


def _show_engines(results: Console, found: Sequence[Verdict], verb: str) -> None:
    """Who loads the checkpoint, and why the others do not."""
    results.print(f"{verb} in {', '.join(verdict.engine for verdict in found if verdict.loads)}")
    for verdict in found:
        if verdict.loads is not True:
            results.print(f"{'not' if verdict.loads is False else 'perhaps'} in {verdict.engine}: {verdict.reason}")


def _show_notes(results: Console, notes: set[str], left_alone: dict[str, str]) -> None:
    for line in _condensed(notes):
        results.print(f"note: {line}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_alone.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        results.print(f"left alone ({reason}): {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")


def _condensed(notes: set[str]) -> list[str]:
    by_text: dict[str, list[str]] = {}
    for note in sorted(notes):
        name, _, text = note.partition(": ")
        by_text.setdefault(text, []).append(name)
    return [f"{text}: {names[0]}{f' and {len(names) - 1} more layers' if len(names) > 1 else ''}" for text, names in by_text.items()]


def _megabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
