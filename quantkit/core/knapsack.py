"""One candidate for each unit, of least total value within a budget of cost: the multiple-choice knapsack, solved exactly.

Partial choices are extended unit by unit and thrown away where another costs no more and is worth no less, or where their Lagrangian bound
(Sinha and Zoltners 1979; Pisinger 1995) is no better than a choice already found. The greedy choice along the units' convex hulls is within
one unit of the bound, so hardly any stay. Cost and value are plain numbers; which of them is size and which is loss is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MOST_STATES = 1 << 20
_SLACK = 1e-12
"""Relative: what rounding may do to a sum of costs or values."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to treat a unit."""

    cost: float
    value: float

    def __post_init__(self) -> None:
        assert self.cost >= 0 and np.isfinite(self.cost) and self.value >= 0 and np.isfinite(self.value), self


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        picks: for each unit the index of its candidate.
        bound: no choice within the budget is worth less; equal to `value`, but for rounding, when the choice is proven to be the best.
    """

    picks: tuple[int, ...]
    cost: float
    value: float
    bound: float


def choose(units: Sequence[Sequence[Candidate]], budget: float, *, most_states: int = MOST_STATES) -> Choice | None:
    """The choice of least value that costs at most `budget`; of equal ones the cheapest; None where the cheapest costs more.

    Args:
        most_states: partial choices kept at once. Beyond them the most promising are kept, and `bound` may lie below `value`.
    """
    fronts = [_front(unit) for unit in units]
    cheapest = sum(front[0].cost for front, _ in fronts)
    limit = min(budget, sum(front[-1].cost for front, _ in fronts)) * (1 + _SLACK)
    if cheapest > limit:
        return None
    weight, greedy = _greedy(fronts, limit)
    found, complete = _extend(fronts, limit, weight, _value(fronts, greedy), most_states)
    picks = greedy if found is None else found
    value = _value(fronts, picks)
    bound = value if complete else min(value, max(0.0, _bound(fronts, weight) - weight * limit))
    chosen = tuple(indices[pick] for (_, indices), pick in zip(fronts, picks, strict=True))
    return Choice(chosen, sum(front[pick].cost for (front, _), pick in zip(fronts, picks, strict=True)), value, bound)


_Front = tuple[list[Candidate], list[int]]
"""Candidates by rising cost and falling value, and the index each had."""


def _front(unit: Sequence[Candidate]) -> _Front:
    """A unit's candidates that are not dominated."""
    assert unit, "a unit without candidates"
    kept: list[Candidate] = []
    indices: list[int] = []
    for index in sorted(range(len(unit)), key=lambda i: (unit[i].cost, unit[i].value)):
        if not kept or unit[index].value < kept[-1].value:
            kept.append(unit[index])
            indices.append(index)
    return kept, indices


def _hull(front: list[Candidate]) -> list[int]:
    """Places on the lower convex hull of a front."""
    hull: list[int] = []
    for place, point in enumerate(front):
        while len(hull) > 1 and _slope(front[hull[-2]], front[hull[-1]]) >= _slope(front[hull[-2]], point):
            hull.pop()
        hull.append(place)
    return hull


def _slope(a: Candidate, b: Candidate) -> float:
    return (b.value - a.value) / (b.cost - a.cost)


def _greedy(fronts: list[_Front], limit: float) -> tuple[float, list[int]]:
    """The Lagrange weight at which the hulls' steps, best first, meet the limit, and those steps that fit."""
    steps = []
    for unit, (front, _) in enumerate(fronts):
        hull = _hull(front)
        steps += [(_slope(front[a], front[b]), unit, b, front[b].cost - front[a].cost) for a, b in pairwise(hull)]
    picks = [0] * len(fronts)
    cost = sum(front[0].cost for front, _ in fronts)
    weight, stuck = 0.0, set()
    for slope, unit, place, extra in sorted(steps):
        if unit in stuck:
            continue
        if cost + extra > limit:
            weight = weight or -slope
            stuck.add(unit)
            continue
        picks[unit] = place
        cost += extra
    return weight, picks


def _value(fronts: list[_Front], picks: Sequence[int]) -> float:
    return float(sum(front[pick].value for (front, _), pick in zip(fronts, picks, strict=True)))


def _bound(fronts: Sequence[_Front], weight: float) -> float:
    """The least of value + weight x cost over these units."""
    return sum(min(c.value + weight * c.cost for c in front) for front, _ in fronts)


def _extend(fronts: list[_Front], limit: float, weight: float, best: float, most_states: int) -> tuple[list[int] | None, bool]:
    """The picks of the best choice that beats `best` or equals it, None where none does, and whether none was lost on the way."""
    cheapest_rest = np.cumsum([0.0, *(front[0].cost for front, _ in reversed(fronts))])[::-1]
    bound_rest = np.cumsum([0.0, *(_bound([front], weight) for front in reversed(fronts))])[::-1]
    cost, value = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    threshold = best + _SLACK * max(best, weight * limit)
    complete = True
    for unit, (front, _) in enumerate(fronts):
        costs = (cost[:, None] + np.array([c.cost for c in front])).ravel()
        values = (value[:, None] + np.array([c.value for c in front])).ravel()
        bounds = values + weight * (costs - limit) + bound_rest[unit + 1]
        kept = np.flatnonzero((costs + cheapest_rest[unit + 1] <= limit) & (bounds <= threshold))
        kept = kept[np.lexsort((values[kept], costs[kept]))]
        kept = kept[_falls(values[kept])]
        if len(kept) > most_states:
            kept = np.sort(kept[np.argsort(bounds[kept], kind="stable")[:most_states]])
            kept = kept[np.lexsort((values[kept], costs[kept]))]
            complete = False
        cost, value = costs[kept], values[kept]
        trail.append(((kept // len(front)).astype(np.int32), (kept % len(front)).astype(np.int16)))
    if not len(value):
        return None, complete
    picks, state = [], int(np.argmin(value))
    for parents, chosen in reversed(trail):
        picks.append(int(chosen[state]))
        state = int(parents[state])
    return picks[::-1], complete


def _falls(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where each is below all before it."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(values)[:-1]]) if len(values) else values
    return values < before
