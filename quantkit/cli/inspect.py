"""`quantkit inspect`: what a checkpoint is, and who loads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from quantkit.formats.summary import LayerSummary, Summary


@click.command()
@click.argument("path")
@click.option("--layers", "all_layers", is_flag=True, help="List every layer and tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect(path: str, all_layers: bool, as_json: bool) -> None:
    """Say what PATH holds: container, schemes, bits per weight, bytes, and which engines load it.

    PATH is a model folder, a GGUF file, a Hub id or `reference`; quantized by any tool, or not at all. Only headers are read.
    """
    import json

    import quantkit

    summary = quantkit.inspect(path)
    if as_json:
        click.echo(json.dumps(summary.to_dict(), indent=1))
        return
    from quantkit.cli.tables import results_console

    console = results_console()
    _show_totals(console, summary)
    if all_layers:
        _show_layers(console, summary)
        _show_tensors(console, summary)
    else:
        _show_schemes(console, summary)
    _show_verdicts(console, summary)


def _show_totals(console: Console, summary: Summary) -> None:
    parameters = f"{summary.parameters:,} parameters" if summary.parameters else "parameters not known"
    files = f"{summary.num_files} file{'s' if summary.num_files != 1 else ''}"
    tied = ", tied embeddings" if summary.is_tied else ""
    console.print(f"{summary.path}: {summary.architecture}, {parameters}, {summary.dtype}{tied}")
    console.print(f"container: {summary.description}")
    file_bpw = f", {summary.file_bpw:.3f} bits per parameter" if summary.file_bpw else ""
    linear_bpw = f"; {summary.linear_bpw:.3f} bits per weight in {len(summary.layers)} quantized layers" if summary.linear_bpw else ""
    console.print(f"size: {_size(summary.file_bytes)} in {files}{file_bpw}{linear_bpw}")
    if summary.kv_cache:
        console.print(f"KV cache: {summary.kv_cache}")
    for note in summary.notes:
        console.print(f"note: {note}")


def _show_schemes(console: Console, summary: Summary) -> None:
    """Quantized layers by scheme, with one name of each kind, and the unquantized rest by type."""
    from quantkit.cli.tables import plain_table

    groups: dict[str, list[LayerSummary]] = {}
    for layer in summary.layers:
        groups.setdefault(layer.scheme, []).append(layer)
    numbers = ("layers", "weights", "bytes", "bits")
    table = plain_table("stored as", *numbers, "which", right=numbers)
    for scheme, layers in groups.items():
        weights, num_bytes = sum(layer.num_weights for layer in layers), sum(layer.num_bytes for layer in layers)
        row = (f"{len(layers):,}", f"{weights:,}", _size(num_bytes), f"{8 * num_bytes / weights:.3f}", _leaves([layer.name for layer in layers]))
        table.add_row(scheme, *row)
    for dtype in dict.fromkeys(tensor.dtype for tensor in summary.unquantized):
        tensors = [tensor for tensor in summary.unquantized if tensor.dtype == dtype]
        num_bytes, count = sum(t.num_bytes for t in tensors), sum(_count(t.shape) for t in tensors)
        bits = f"{8 * num_bytes / count:.3f}" if count else ""
        table.add_row(dtype, f"{len(tensors):,}", f"{count:,}", _size(num_bytes), bits, _leaves([t.name.removesuffix(".weight") for t in tensors]))
    if table.row_count:
        console.print()
        console.print(table)


def _show_layers(console: Console, summary: Summary) -> None:
    from quantkit.cli.tables import plain_table

    table = plain_table("layer", "shape", "stored as", "bytes", "bits", right=("bytes", "bits"))
    for layer in summary.layers:
        table.add_row(layer.name, f"{layer.shape[0]} x {layer.shape[1]}", layer.scheme, f"{layer.num_bytes:,}", f"{layer.bpw:.3f}")
    if summary.layers:
        console.print()
        console.print(table)


def _show_tensors(console: Console, summary: Summary) -> None:
    from quantkit.cli.tables import plain_table

    table = plain_table("tensor", "shape", "type", "bytes", right=("bytes",))
    for tensor in summary.unquantized:
        table.add_row(tensor.name, " x ".join(map(str, tensor.shape)), tensor.dtype, f"{tensor.num_bytes:,}")
    if summary.unquantized:
        console.print()
        console.print(table)


def _show_verdicts(console: Console, summary: Summary) -> None:
    from quantkit.cli.tables import plain_table

    table = plain_table("engine", "version", "loads", "")
    words = {True: "yes", False: "no", None: "?"}
    for verdict in summary.verdicts:
        table.add_row(verdict.engine, verdict.version, words[verdict.loads], "; ".join(filter(None, (verdict.reason, *verdict.notes))))
    console.print()
    console.print(table)


def _leaves(names: list[str]) -> str:
    """The last parts of the names, each once: what kinds of layers these are."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else "")


def _count(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} bytes"
