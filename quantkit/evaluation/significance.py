"""Whether a difference between two models is real, from scores of both on the same documents.

Paired throughout: what a document's difficulty adds to both sides cancels. Right or wrong answers are compared by McNemar's exact test (McNemar,
1947; the binomial over documents that only one model got right) and Bonett and Price's interval for a difference of paired proportions (2012), which
holds its level at small counts; other scores by the bootstrap over documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from quantkit.errors import UsageError

LEVEL = 0.95
POWER = 0.8
_RESAMPLES = 10_000
_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class PairedResult:
    """A quantized model's mean score against its baseline's on `num_documents` documents.

    Attributes:
        difference: quantized minus baseline, in the score's own unit (a share of 1 for accuracy); `low` and `high` bound it at `LEVEL`.
        p_value: how often a difference as large comes about where there is none.
        recovery: quantized over baseline; None where the baseline scores nothing.
        detectable: the smallest true difference that a sample like this shows with a probability of `POWER`.
    """

    num_documents: int
    baseline: float
    quantized: float
    difference: float
    low: float
    high: float
    p_value: float
    recovery: float | None
    recovery_low: float | None
    recovery_high: float | None
    detectable: float

    @property
    def is_real(self) -> bool:
        return self.p_value < 1 - LEVEL

    @property
    def verdict(self) -> str:
        """In a user's words, in points of a hundred."""
        if self.is_real:
            what = "loss" if self.difference < 0 else "gain"
            return f"a {what} of {abs(100 * self.difference):.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        return f"no loss detectable above {100 * self.detectable:.1f} points"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_real": self.is_real, "verdict": self.verdict}


def compare_scores(baseline: Sequence[float], quantized: Sequence[float], *, seed: int = 0) -> PairedResult:
    """Both models' scores of the same documents, in the same order.

    Raises:
        UsageError: there are none, or not as many of one as of the other.
    """
    b, q = np.asarray(baseline, dtype=np.float64), np.asarray(quantized, dtype=np.float64)
    if b.shape != q.shape or b.ndim != 1 or not len(b):
        raise UsageError(f"paired scores need the same documents on both sides, at least one; there are {b.size} of the baseline and {q.size}")
    is_binary = bool(np.isin(b, (0, 1)).all() and np.isin(q, (0, 1)).all())
    means = _resampled_means(b, q, seed)
    low, high, p_value = _of_answers(b, q) if is_binary else _of_scores(b, q, means)
    recovery = _recovery(b, q, means, (low, high))
    spread = math.sqrt(max(float(np.mean((q - b) ** 2)), 1 / len(b)) / len(b))  # as if at least one document had turned
    detectable = (stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)) * spread
    return PairedResult(len(b), float(b.mean()), float(q.mean()), float(q.mean() - b.mean()), low, high, p_value, *recovery, float(detectable))


def _of_answers(b: np.ndarray, q: np.ndarray) -> tuple[float, float, float]:
    """Interval and p-value of right (1) and wrong (0) answers."""
    lost, won, count = int(((b == 1) & (q == 0)).sum()), int(((b == 0) & (q == 1)).sum()), len(b)
    p_value = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    shares = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    middle = shares[1] - shares[0]
    reach = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt((sum(shares) - middle**2) / (count + 2))
    return max(-1.0, middle - reach), min(1.0, middle + reach), p_value


def _of_scores(b: np.ndarray, q: np.ndarray, means: np.ndarray) -> tuple[float, float, float]:
    """Interval by the bootstrap, p-value by the sign of as many differences turned at random."""
    differences = q - b
    low, high = np.quantile(means[:, 1] - means[:, 0], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    generator, observed, extreme = np.random.default_rng(1), abs(differences.mean()), 0
    rows = max(1, _AT_ONCE // len(b))
    for done in range(0, _RESAMPLES, rows):
        signs = generator.integers(0, 2, (min(rows, _RESAMPLES - done), len(b)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences / len(b)) >= observed - 1e-12).sum())
    return float(low), float(high), (extreme + 1) / (_RESAMPLES + 1)


def _recovery(
    b: np.ndarray, q: np.ndarray, means: np.ndarray, difference: tuple[float, float]
) -> tuple[float | None, float | None, float | None]:
    """Quantized over baseline with its interval: the bootstrap's, and no narrower than that of the difference, which allows for what was not seen."""
    if b.mean() == 0:
        return None, None, None
    ratios = means[:, 1] / np.where(means[:, 0] == 0, np.nan, means[:, 0])
    low, high = np.nanquantile(ratios, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    own = [1 + each / b.mean() for each in difference]
    return float(q.mean() / b.mean()), float(min(low, own[0])), float(max(high, own[1]))


def _resampled_means(b: np.ndarray, q: np.ndarray, seed: int) -> np.ndarray:
    """Means of both sides [_RESAMPLES, 2] over documents drawn with replacement."""
    generator = np.random.default_rng(seed)
    kinds, counts = np.unique(np.stack([b, q], axis=1), axis=0, return_counts=True)
    rows = max(1, _AT_ONCE // len(kinds))  # documents with equal scores are drawn together
    parts = [generator.multinomial(len(b), counts / len(b), min(rows, _RESAMPLES - done)) @ kinds / len(b) for done in range(0, _RESAMPLES, rows)]
    return np.concatenate(parts)
