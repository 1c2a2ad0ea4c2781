"""Schemes for units of layers from what each would lose: the best choice within a budget of bits, or the smallest within a KL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path

import numpy as np
import torch

from quantkit.conversion.allocation_file import Measurement
from quantkit.conversion.budget import Budget
from quantkit.conversion.plan import Plan
from quantkit.conversion.recipe import Recipe
from quantkit.conversion.units import Option, Unit, find_units, stored_bits
from quantkit.core.knapsack import Candidate, choose
from quantkit.errors import RecipeError, UsageError

Losses = Mapping[str, Mapping[str, float]]
"""Nats a token, by layer and scheme."""


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

    def require_possible(self, *, is_users: bool) -> None:
        """Refuse bits that no choice comes to; a KL can be judged only once it is measured.

        Raises:
            UsageError: the budget is the user's.
            RecipeError: it is the recipe's.
        """
        low, high = (ceil(end * 1000) / 1000 for end in self.range)
        amount = self.budget.amount
        if self.budget.kind == "kl" or low <= amount <= high or self.range[0] <= amount <= self.range[1]:
            return
        where = "below" if amount < low else "above"
        raise (UsageError if is_users else RecipeError)(
            f"{self.budget} is {where} what these candidates come to, {low:.3f} to {high:.3f} bits a weight{self._of_what}; "
            f"the nearest that works is {self._prefix}{low if amount < low else high:.3f}, and other candidates reach further"
            + "".join(f"; {why}" for why in self.dropped)
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
    """The choice there is in a plan; raises RecipeError where there is none."""
    assert recipe.allocate is not None
    units, dropped = find_units(plan, recipe, format_name, model_dtype)
    free = {name for unit in units for name in unit.layers}
    fixed = sum(stored_bits(plan.format, layer, model_dtype) for name, layer in plan.layers.items() if name not in free)
    other = 8 * plan.bytes_after - plan.bits_of_layers
    return Problem(units, recipe.allocate.budget, fixed, plan.weights_of_layers, other, plan.parameters, dropped)
