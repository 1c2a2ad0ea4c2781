"""How an allocation of bits looks in a terminal: which scheme every kind of layer takes in which blocks, and what that is predicted to cost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from quantkit.cli.tables import plain_table
from quantkit.conversion.candidates import known_before
from quantkit.conversion.prepare import Prepared

_BLOCK = re.compile(r"\.(\d+)\.")


def show_allocation(results: Console, prepared: Prepared) -> None:
    """The plan of a conversion that allocates; before it is measured, what can be asked for."""
    allocation = prepared.allocation
    if allocation is None:
        return
    low, high = allocation.problem.range
    over = "over the file" if allocation.problem.budget.kind == "file" else "in quantized layers"
    results.print(f"allocation to {allocation.problem.budget}; the candidates reach from {low:.3f} to {high:.3f} bits a weight {over}")
    if allocation.solution is None or allocation.measurement is None:
        results.print(_candidates(known_before(allocation.problem, prepared.plan, prepared.model_dtype)))
        return
    results.print(chosen(allocation.solution.units))
    results.print(f"KL divergence predicted: {allocation.solution.predicted:.3g} nats a token, from {allocation.measurement.calibration}")


def chosen(units: dict[str, str]) -> Table:
    """Which scheme every kind of layer has, and in which blocks."""
    table = plain_table("layers", "scheme", "blocks")
    for kind, scheme, blocks in _by_kind(units):
        table.add_row(kind, scheme, blocks)
    return table


def _candidates(known: dict[str, Any]) -> Table:
    table = plain_table("candidate", "units", "would load in")
    for each in known["candidates"]:
        table.add_row(each["scheme"], f"{each['units']:,}", _loaders(each["engines"]))
    table.add_row("side by side", "", _loaders(known["mixture"]["engines"]))
    return table


def _loaders(engines: list[dict[str, Any]]) -> str:
    return ", ".join(each["engine"] for each in engines if each["loads"])


def allocation_line(allocation: dict[str, Any]) -> str:
    """One line of the account."""
    measured = "not measured" if allocation["measured_kl"] is None else f"measured {allocation['measured_kl']:.3g}"
    kept = "" if allocation["kept"] else ", NOT kept"
    return f"{allocation['budget']}{kept}; KL predicted {allocation['predicted_kl']:.3g}, {measured}"


def _by_kind(units: dict[str, str]) -> list[tuple[str, str, str]]:
    """Kind of layer, scheme, and the blocks in which it has that, as ranges."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, scheme in units.items():
        block = _BLOCK.search(name)
        kind = name if block is None else name[block.end() :]
        found.setdefault((kind, scheme), []).extend([int(block[1])] if block else [])
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    return [(kind, scheme, _ranges(blocks)) for kind in kinds for (of, scheme), blocks in sorted(found.items()) if of == kind]


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
