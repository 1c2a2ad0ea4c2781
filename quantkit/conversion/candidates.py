"""Which candidates of an allocation engines load: known from headers, before anything is measured.

What an engine would reject is no candidate where it is meant for that engine; what is chosen in the end may be any mixture of the rest, so one with
all of them side by side is judged too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from quantkit.checkpoint.weight_files import some
from quantkit.conversion.allocation import Problem
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.plan import Plan
from quantkit.conversion.targets import notes_on, stored_as
from quantkit.conversion.units import Unit
from quantkit.core.scheme import Scheme
from quantkit.errors import FormatError
from quantkit.formats.engine_rules import Stored
from quantkit.formats.engines import Engine, Verdict, find_engine, verdict, verdicts

_WAY = "name candidates that it loads in the recipe (allocate: candidates), or another --format"


def loadable(problem: Problem, plan: Plan, options: ConvertOptions, model_dtype: torch.dtype) -> Problem:
    """The problem without what an engine of `target_engines` would reject; `dropped` says what and why.

    Raises:
        FormatError: a unit is left without a candidate, or none has two.
    """
    units = list(problem.units)
    dropped: dict[str, list[str]] = defaultdict(list)
    for candidate in _candidates(units):
        for engine in map(find_engine, options.target_engines):
            if _judged(engine, candidate, units, plan, model_dtype).loads is not False:
                continue
            refused = {unit.name: why for unit in units if (why := _refusal(engine, candidate, unit, plan, model_dtype)) is not None}
            if refused:
                dropped[_in_words(engine, candidate, refused, units, plan)].append(candidate)
                units = [_without(unit, candidate) if unit.name in refused else unit for unit in units]
    told = tuple(f"{', '.join(names)} {'is no candidate' if len(names) == 1 else 'are no candidates'}{why}" for why, names in dropped.items())
    _require_choice(units, told)
    return replace(problem, units=tuple(units), dropped=problem.dropped + told)


def require_mixture(problem: Problem, plan: Plan, options: ConvertOptions, model_dtype: torch.dtype) -> None:
    """Notes where it is not known whether an engine loads the candidates side by side.

    Raises:
        FormatError: an engine of `target_engines` would not.
    """
    stored = _mixture(problem, plan, model_dtype)
    for engine in map(find_engine, options.target_engines):
        found = verdict(engine, stored)
        if found.loads is False:
            names = ", ".join(dict.fromkeys(layer.scheme.name for layer in stored.layers))
            way = "leave the budget out to have one scheme for all layers, or name candidates that it loads together (allocate: candidates)"
            raise FormatError(f"{engine.name} {engine.version} would not load {names} side by side in {plan.format.name}: {found.reason}; {way}")
        plan.notes += notes_on(found)


def known_before(problem: Problem, plan: Plan, model_dtype: torch.dtype) -> dict[str, Any]:
    """JSON values: what is known of an allocation before it is measured, with every engine's verdict on each candidate and on a mixture."""
    units = problem.units
    return {
        "budget": str(problem.budget), "range": list(problem.range), "dropped": list(problem.dropped),
        "candidates": [
            {"scheme": name, "units": sum(name in unit.options for unit in units),
             "engines": _in_json(stored_as(plan, _schemes(name, units), model_dtype))} for name in _candidates(units)
        ],
        "mixture": {"engines": _in_json(_mixture(problem, plan, model_dtype))},
    }  # fmt: skip


def _candidates(units: Iterable[Unit]) -> list[str]:
    return list(dict.fromkeys(name for unit in units for name in unit.options))


def _schemes(candidate: str, units: Iterable[Unit]) -> dict[str, Scheme]:
    """What the candidate comes to in every layer that may take it."""
    options = [unit.options[candidate] for unit in units if candidate in unit.options]
    return {name: layer.scheme for option in options for name, layer in option.layers.items()}


def _judged(engine: Engine, candidate: str, units: Iterable[Unit], plan: Plan, model_dtype: torch.dtype) -> Verdict:
    return verdict(engine, stored_as(plan, _schemes(candidate, units), model_dtype))


def _refusal(engine: Engine, candidate: str, unit: Unit, plan: Plan, model_dtype: torch.dtype) -> str | None:
    """Why the engine rejects a unit of this scheme alone."""
    if candidate not in unit.options:
        return None
    found = _judged(engine, candidate, [unit], plan, model_dtype)
    return found.reason if found.loads is False else None


def _without(unit: Unit, candidate: str) -> Unit:
    return replace(unit, options={name: option for name, option in unit.options.items() if name != candidate})


def _in_words(engine: Engine, candidate: str, refused: dict[str, str], units: Iterable[Unit], plan: Plan) -> str:
    num_takers = sum(candidate in unit.options for unit in units)
    where = "" if len(refused) == num_takers else f" for {some(list(refused), 1)}"
    why = next(iter(refused.values()))
    return f"{where}: {engine.name} {engine.version} would not load that in {plan.format.name} ({why})"


def _require_choice(units: Iterable[Unit], dropped: Iterable[str]) -> None:
    if not dropped:
        return
    bare = [unit.name for unit in units if not unit.options]
    if bare:
        raise FormatError(f"no candidate is left for {some(bare, 1)}: {'; '.join(dropped)}; {_WAY}")
    if all(len(unit.options) < 2 for unit in units):
        left = ", ".join(_candidates(units))
        raise FormatError(f"there is nothing to allocate, as {left} alone is left: {'; '.join(dropped)}; {_WAY}")


def _mixture(problem: Problem, plan: Plan, model_dtype: torch.dtype) -> Stored:
    """Every layer with a scheme that it may take, so that all candidates are there; those without a choice as they are."""
    schemes = {name: layer.scheme for name, layer in plan.layers.items()}
    turns: dict[tuple[str, ...], int] = defaultdict(int)
    for unit in problem.units:
        names = tuple(unit.options)
        chosen = unit.options[names[turns[names] % len(names)]]
        turns[names] += 1
        schemes |= {name: layer.scheme for name, layer in chosen.layers.items()}
    return stored_as(plan, schemes, model_dtype)


def _in_json(stored: Stored) -> list[dict[str, Any]]:
    return [each.to_dict() for each in verdicts(stored)]
