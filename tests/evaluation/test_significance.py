"""Differences between models: what statsmodels and scipy say, and under no difference no more alarms than stated."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from quantkit.errors import UsageError
from quantkit.evaluation.significance import LEVEL, POWER, compare_scores


def answers(count: int, *, right: float, lost: float, won: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers: of the right ones a share is lost, of the wrong ones a share won."""
    draw = np.random.default_rng(seed)
    baseline = draw.random(count) < right
    turned = draw.random(count) < np.where(baseline, lost, won)
    return baseline.astype(float), (baseline ^ turned).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_the_p_value_of_answers_is_statsmodels(seed: int) -> None:
    b, q = answers(400, right=0.6, lost=0.08, won=0.05, seed=seed)
    table = [[np.sum((b == i) & (q == j)) for j in (1, 0)] for i in (1, 0)]

    assert compare_scores(b, q).p_value == pytest.approx(mcnemar(table, exact=True).pvalue)


def test_the_interval_of_scores_is_scipys_bootstrap() -> None:
    draw = np.random.default_rng(1)
    b = draw.random(300)
    q = b + draw.normal(-0.02, 0.1, 300)

    found = compare_scores(b, q)

    theirs = stats.bootstrap((q - b,), np.mean, method="percentile", n_resamples=20_000, rng=draw).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=6e-4)
    assert found.p_value == pytest.approx(stats.permutation_test((q - b,), np.mean, permutation_type="samples", rng=draw).pvalue, abs=3e-3)


def test_where_there_is_no_difference_one_is_claimed_no_more_often_than_stated() -> None:
    found = [compare_scores(*answers(200, right=0.5, lost=0.1, won=0.1, seed=seed)) for seed in range(400)]

    allowed = stats.binom.ppf(0.999, len(found), 1 - LEVEL)
    assert sum(each.is_real for each in found) <= allowed
    assert sum(not each.low <= 0 <= each.high for each in found) <= allowed


def test_a_difference_of_the_detectable_size_is_mostly_found() -> None:
    """A loss of 4.5 points of answers, at a sample whose detectable size is that."""
    found = [compare_scores(*answers(500, right=0.5, lost=0.17, won=0.08, seed=seed)) for seed in range(200)]

    assert np.mean([each.detectable for each in found]) == pytest.approx(0.045, abs=0.003)
    assert np.mean([each.is_real for each in found]) == pytest.approx(POWER, abs=0.1)


def test_the_true_recovery_lies_in_its_interval_as_often_as_stated() -> None:
    found = [compare_scores(*answers(300, right=0.5, lost=0.1, won=0.04, seed=seed)) for seed in range(200)]

    truth = (0.5 * 0.9 + 0.5 * 0.04) / 0.5
    assert np.mean([each.recovery_low <= truth <= each.recovery_high for each in found]) > 0.9


def test_verdicts_say_the_size() -> None:
    same = [1.0, 0.0] * 100
    assert compare_scores(same, same).verdict == "no loss detectable above 1.4 points"
    worse = compare_scores([1.0] * 100, [1.0] * 80 + [0.0] * 20)
    assert worse.verdict.startswith("a loss of 20.0 points") and worse.recovery == pytest.approx(0.8)
    assert compare_scores([0.0] * 80 + [1.0] * 20, [1.0] * 100).verdict.startswith("a gain of 80.0 points")


def test_a_baseline_without_a_right_answer_has_no_recovery() -> None:
    assert compare_scores([0.0] * 10, [0.0] * 9 + [1.0]).recovery is None


@pytest.mark.parametrize(("baseline", "quantized"), [([], []), ([1.0], [1.0, 0.0])])
def test_unpaired_scores_are_refused(baseline: list[float], quantized: list[float]) -> None:
    with pytest.raises(UsageError, match="same documents on both sides"):
        compare_scores(baseline, quantized)
