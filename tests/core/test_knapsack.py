"""The knapsack's choice is the best of all, never gets worse with a larger budget, and says so truly where it is not proven."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.core.knapsack import Candidate, choose

CANDIDATES = st.builds(Candidate, st.integers(0, 60).map(float), st.floats(0, 10, allow_nan=False))
UNITS = st.lists(st.lists(CANDIDATES, min_size=1, max_size=5), min_size=1, max_size=5)


def best_of_all(units: list[list[Candidate]], budget: float) -> float | None:
    totals = [(sum(c.cost for c in picks), sum(c.value for c in picks)) for picks in product(*units)]
    return min((value for cost, value in totals if cost <= budget), default=None)


@given(UNITS, st.integers(0, 250))
@settings(max_examples=400, deadline=None)
def test_no_other_choice_within_the_budget_is_worth_less(units: list[list[Candidate]], budget: int) -> None:
    best, found = best_of_all(units, budget), choose(units, budget)

    if best is None:
        assert found is None
        return
    assert found is not None and found.value == pytest.approx(best, rel=1e-9, abs=1e-9) and found.bound == found.value
    assert choose(units, float("inf")).value == pytest.approx(best_of_all(units, float("inf")))
    assert found.cost <= budget and found.cost == sum(unit[pick].cost for unit, pick in zip(units, found.picks, strict=True))


def layers(count: int, seed: int) -> list[list[Candidate]]:
    """Losses that fall fourfold a bit, as rounding errors do, in layers of a few sizes and very unlike sensitivity."""
    random = np.random.default_rng(seed)
    sizes, sensitivity = random.choice([4096 * 4096, 4096 * 14336, 4096 * 6144], count), random.lognormal(0, 2, count)
    bits = (2.125, 2.25, 3.125, 3.25, 4.125, 4.25, 5.125, 6.125, 8.125)
    losses = sensitivity[:, None] * sizes[:, None] * 4.0 ** -np.array(bits) * random.lognormal(0, 0.2, (count, len(bits)))
    return [[Candidate(b * size, loss) for b, loss in zip(bits, row, strict=True)] for size, row in zip(sizes.tolist(), losses.tolist(), strict=True)]


def test_a_model_of_500_units_is_solved_to_the_proven_best_and_a_larger_budget_never_loses_more() -> None:
    units = layers(500, 0)
    weights = sum(unit[0].cost for unit in units) / 2.125

    found = [choose(units, weights * target) for target in np.linspace(2.2, 8.2, 13)]

    assert all(one is not None and one.value == one.bound for one in found)
    values = [one.value for one in found if one is not None]
    assert values == sorted(values, reverse=True)


def test_with_few_states_the_choice_keeps_the_budget_and_the_bound_stays_true() -> None:
    units = layers(40, 1)
    budget = 4.3 * sum(unit[0].cost for unit in units) / 2.125
    exact, short = choose(units, budget), choose(units, budget, most_states=2)

    assert exact is not None and short is not None
    assert short.cost <= budget and short.bound <= exact.value <= short.value
