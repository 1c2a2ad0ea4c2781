"""Schemes for layers from what each would lose: units that engines read with one scheme, their candidates, and the best choice within a budget."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path

import numpy as np
import torch

from quantkit.conversion.allocation_file import Measurement
from quantkit.conversion.budget import Budget, family
from quantkit.conversion.plan import LayerPlan, Plan, fit, with_scheme
from quantkit.conversion.recipe import Recipe, Rule
from quantkit.core.knapsack import Candidate, choose
from quantkit.core.scheme import parse_scheme
from quantkit.errors import RecipeError, UsageError
from quantkit.formats.base import Format, plan_shapes
from quantkit.formats.fusion import fused_groups
from quantkit.formats.registry import get_format

Losses = Mapping[str, Mapping[str, float]]
"""Nats a token, by layer and scheme."""

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.")


@dataclass(frozen=True, slots=True)
class Option:
    """One scheme for a unit: what each layer makes of it by the group rule, and the bits stored."""

    layers: dict[str, LayerPlan]
    bits: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that take one scheme: those an engine joins, all experts of a block, or one layer alone. Options by the scheme's name."""

    name: str
    options: dict[str, Option]

    @property
    def layers(self) -> list[str]:
        return list(next(iter(self.options.values())).layers)


@dataclass(frozen=True, slots=True)
class Solution:
    """What was chosen.

    Attributes:
        units: the scheme of every unit.
        predicted: nats a token; `bound` is what no choice in the budget is predicted to go below, and is `predicted` where that is proven.
    """

    units: dict[str, str]
    layers: dict[str, str]
    bits: int
    linear_bpw: float
    predicted: float
    bound: float


@dataclass(frozen=True, eq=False)
class Problem:
    """The choice that is to be made, without losses: known from headers.

    Attributes:
        fixed_bits: of quantized layers that have no choice.
        weights: of all quantized layers.
        other_bits: of the weight files beyond quantized layers; `parameters` counts all.
        dropped: why some candidates are none here.
    """

    units: tuple[Unit, ...]
    budget: Budget
    fixed_bits: int
    weights: int
    other_bits: int
    parameters: int
    dropped: tuple[str, ...] = ()

    @cached_property
    def range(self) -> tuple[float, float]:
        """The least and the most bits a weight that can be chosen, over what the budget counts."""
        ends = [sum(end(option.bits for option in unit.options.values()) for unit in self.units) for end in (min, max)]
        return self._per_weight(ends[0]), self._per_weight(ends[1])

    def _per_weight(self, bits: float) -> float:
        if self.budget.kind == "file":
            return (bits + self.fixed_bits + self.other_bits) / self.parameters
        return (bits + self.fixed_bits) / self.weights

    def require_possible(self) -> None:
        """Raises UsageError for bits that no choice comes to; a KL can be judged only once it is measured."""
        low, high = (ceil(end * 1000) / 1000 for end in self.range)
        amount = self.budget.amount
        if self.budget.kind == "kl" or low <= amount <= high or self.range[0] <= amount <= self.range[1]:
            return
        where = "below" if amount < low else "above"
        raise UsageError(
            f"{self.budget} is {where} what these candidates come to, {low:.3f} to {high:.3f} bits a weight{self._of_what}; "
            f"the nearest that works is {self._prefix}{low if amount < low else high:.3f}, and other candidates reach further"
        )

    @property
    def _of_what(self) -> str:
        return " over the file" if self.budget.kind == "file" else ""

    @property
    def _prefix(self) -> str:
        return "file:" if self.budget.kind == "file" else ""

    def solve(self, losses: Losses, factor: float = 1.0, spare: int = 0) -> Solution | None:
        """The choice of least predicted loss within the bits, or of least bits within the KL; None where nothing keeps to it.

        Args:
            factor: what predictions are multiplied by to be compared with a KL.
            spare: bits of the budget to leave.
        """
        if self.budget.kind == "kl":
            return self._solved(losses, factor, self.budget.amount, by_loss=True)
        whole = self.budget.amount * (self.parameters if self.budget.kind == "file" else self.weights)
        return self._solved(losses, factor, whole - self.fixed_bits - (self.other_bits if self.budget.kind == "file" else 0) - spare, by_loss=False)

    def solve_bits(self, losses: Losses, factor: float, bits: float) -> Solution | None:
        """The choice of least predicted loss within these bits of the units."""
        return self._solved(losses, factor, bits, by_loss=False)

    def _solved(self, losses: Losses, factor: float, limit: float, *, by_loss: bool) -> Solution | None:
        table = [[(option.bits, factor * _loss(option, losses)) for option in unit.options.values()] for unit in self.units]
        costs = [[Candidate(loss, bits) if by_loss else Candidate(bits, loss) for bits, loss in row] for row in table]
        choice = choose(costs, limit)
        if choice is None:
            return None
        chosen = [list(unit.options)[pick] for unit, pick in zip(self.units, choice.picks, strict=True)]
        bits = sum(row[pick][0] for row, pick in zip(table, choice.picks, strict=True))
        predicted = sum(row[pick][1] for row, pick in zip(table, choice.picks, strict=True))
        layers = {layer: scheme for unit, scheme in zip(self.units, chosen, strict=True) for layer in unit.layers}
        units = {unit.name: scheme for unit, scheme in zip(self.units, chosen, strict=True)}
        bpw = (bits + self.fixed_bits) / self.weights
        return Solution(units, layers, bits, bpw, predicted, predicted if by_loss else min(predicted, choice.bound))

    def guess(self) -> dict[str, dict[str, float]]:
        """Losses as if all weights mattered alike: a stand-in for sizes before anything is measured."""
        losses: dict[str, dict[str, float]] = {}
        for unit in self.units:
            for option in unit.options.values():
                for name, layer in option.layers.items():
                    assert layer.scheme.weight is not None
                    losses.setdefault(name, {})[layer.scheme.name] = prod(layer.linear.shape) * 4.0**-layer.scheme.weight.bits
        return losses

    def curve(self, losses: Losses, factor: float, points: int = 41) -> list[tuple[float, float]]:
        """Bits a weight in quantized layers, and the predicted KL of the best choice within them."""
        ends = [sum(end(option.bits for option in unit.options.values()) for unit in self.units) for end in (min, max)]
        found = [self.solve_bits(losses, factor, bits) for bits in np.linspace(*ends, points)]
        return list(dict.fromkeys((each.linear_bpw, each.predicted) for each in found if each is not None))

    def uniform(self, losses: Losses, factor: float) -> dict[str, tuple[float, float]]:
        """The same for every scheme that all units could take."""
        shared = [name for name in self.units[0].options if all(name in unit.options for unit in self.units)]
        options = {name: [unit.options[name] for unit in self.units] for name in shared}
        return {
            name: ((sum(o.bits for o in each) + self.fixed_bits) / self.weights, factor * sum(_loss(o, losses) for o in each))
            for name, each in options.items()
        }


@dataclass(frozen=True, eq=False, slots=True)
class Allocation:
    """A problem, and as soon as there are any, what was measured and what was chosen. Predictions in `solution` have their factor."""

    problem: Problem
    measurement: Measurement | None = None
    solution: Solution | None = None

    def require_covered(self, measurement: Measurement, origin: Path, fingerprint: str) -> None:
        """Raises UsageError where a file's measurement is of another model, or lacks a candidate."""
        if measurement.fingerprint != fingerprint:
            raise UsageError(f"{origin} was measured on other weights, those of {measurement.source}; give a new name to measure this model")
        lacking = self.lacking(measurement)
        if lacking:
            raise UsageError(f"{origin} has not measured {lacking}; give a new name to measure, or a recipe with the candidates it has")

    def lacking(self, measurement: Measurement) -> str | None:
        """The first candidate that was not measured."""
        for unit in self.problem.units:
            for option in unit.options.values():
                for name, layer in option.layers.items():
                    if layer.scheme.name not in measurement.losses.get(name, {}):
                        return f"{layer.scheme.name} of {name}"
        return None


def _loss(option: Option, losses: Losses) -> float:
    return sum(losses[name][layer.scheme.name] for name, layer in option.layers.items())


def state_problem(plan: Plan, recipe: Recipe, format_name: str, model_dtype: torch.dtype) -> Problem:
    """What there is to choose in a plan. The container may hold fewer schemes than are wished for.

    Raises:
        RecipeError: a layer is left without a candidate, or no layer has two.
    """
    assert recipe.allocate is not None
    named = [*(recipe.allocate.candidates or ()), *(name for rule in recipe.rules for name in (rule.scheme, *(rule.candidates or ())))]
    fmt = get_format(format_name, map(parse_scheme, named))
    dropped: dict[str, None] = {}
    found: dict[str, dict[str, Option]] = {}
    for name, layer in plan.layers.items():
        rule = recipe.rule_for(name)
        assert rule is not None
        wanted = _wanted(rule, recipe)
        if wanted:
            found[name] = _options(layer, rule, recipe, wanted, fmt, model_dtype, dropped)
    units = tuple(_unit(joint, [found[name] for name in members]) for joint, members in _joined(found).items())
    if all(len(unit.options) < 2 for unit in units):
        raise RecipeError("there is nothing to allocate: " + ("; ".join(dropped) or "every layer has one candidate, or its scheme is fixed"))
    chosen = {name: layer for unit in units for name, layer in next(iter(unit.options.values())).layers.items()}
    fixed = sum(stored_bits(fmt, layer, model_dtype) for name, layer in plan.layers.items() if name not in chosen)
    other = 8 * plan.bytes_after - plan.bits_of_layers
    return Problem(units, recipe.allocate.budget, fixed, plan.weights_of_layers, other, plan.parameters, tuple(dropped))


def _wanted(rule: Rule, recipe: Recipe) -> tuple[str, ...]:
    assert recipe.allocate is not None
    if rule.candidates is not None:
        return rule.candidates
    return recipe.allocate.candidates or family(parse_scheme(rule.scheme), keep_group=rule.strict)


def _options(
    layer: LayerPlan, rule: Rule, recipe: Recipe, wanted: Iterable[str], fmt: Format, model_dtype: torch.dtype, dropped: dict[str, None]
) -> dict[str, Option]:
    options: dict[str, Option] = {}
    for name in wanted:
        fitted = fit(layer.linear, with_scheme(rule, name), recipe)
        why = fmt.why_not(fitted.scheme, layer.linear.shape) if fitted.scheme.is_quantized else "its fallback leaves layers as they are"
        if why is None:
            options[name] = Option({layer.linear.name: fitted}, stored_bits(fmt, fitted, model_dtype))
        else:
            dropped[f"{name} is no candidate: {why}"] = None
    if not options:
        raise RecipeError(f"no candidate is left for {layer.linear.name}: {'; '.join(dropped)}")
    return options


def stored_bits(fmt: Format, layer: LayerPlan, model_dtype: torch.dtype) -> int:
    """Everything that the container stores for a layer."""
    parts = plan_shapes(fmt, layer.scheme, layer.linear.shape, model_dtype).values()
    return sum(8 * dtype.itemsize * prod(shape) for dtype, shape in parts)


def _joined(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by the unit they are of, in the order of the plan."""
    names = list(names)
    joint = {member: name for name, members in fused_groups(names).items() for member in members}
    units: dict[str, list[str]] = {}
    for name in names:
        expert = _EXPERT.match(name)
        units.setdefault(expert[1] if expert else joint.get(name, name), []).append(name)
    return units


def _unit(name: str, members: list[dict[str, Option]]) -> Unit:
    """A unit of layers with these options each; what one of them cannot take, none does, and schemes that come to the same are one."""
    shared = [scheme for scheme in members[0] if all(scheme in options for options in members)]
    if not shared:
        raise RecipeError(f"the layers of {name} take one scheme in engines, and the recipe gives them candidates without a common one")
    options: dict[str, Option] = {}
    seen: set[tuple[str, ...]] = set()
    for scheme in shared:
        layers = {layer: plan for options_of in members for layer, plan in options_of[scheme].layers.items()}
        kinds = tuple(plan.scheme.name for plan in layers.values())
        if kinds not in seen:
            seen.add(kinds)
            options[scheme] = Option(layers, sum(options_of[scheme].bits for options_of in members))
    return Unit(name, options)
