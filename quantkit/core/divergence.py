"""What quantization changed in a model's next-token distributions: KL divergence, perplexity and their errors, token by token.

The statistics and their standard errors are those of `llama-perplexity --kl-divergence`, under its names: means with std / sqrt(n - 1), the error
of the perplexity ratio from the covariance of the two models' losses on the same tokens. KL(baseline || quantized) is in nats and, like all
softmaxes here, computed in float32; sums over tokens are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import CheckpointError, UsageError

_CHUNK = 1 << 23
"""Logits handled at once: temporaries stay below 200 MB whatever the batch and the vocabulary."""

_FIRST_POSITIONS = 32
"""Positions of the first part of the results by position."""

_KL_PERCENTILES = {
    "maximum": 1.0, "99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "median": 0.5,
    "10.0%": 0.1, "5.0%": 0.05, "1.0%": 0.01, "minimum": 0.0,
}  # fmt: skip
_DELTA_P_PERCENTILES = {
    "maximum": 1.0, "99.9%": 0.999, "99.0%": 0.99, "95.0%": 0.95, "90.0%": 0.9, "75.0%": 0.75, "median": 0.5,
    "25.0%": 0.25, "10.0%": 0.1, "5.0%": 0.05, "1.0%": 0.01, "0.1%": 0.001, "minimum": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """Perplexity of one model over `num_tokens` predicted tokens. Standard errors are NaN for a single token."""

    num_tokens: int
    ppl: float
    ppl_se: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not a number is None."""
        return _json_values(asdict(self))


@dataclass(frozen=True, slots=True)
class PositionResult:
    """The same at the positions [start, end) of their texts."""

    start: int
    end: int
    num_tokens: int
    ppl_baseline: float
    ppl_quantized: float
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float
    kl_mean: float
    kl_se: float


@dataclass(frozen=True, slots=True)
class DivergenceResult:
    """A quantized model against its baseline over the same tokens; `_se` is the standard error of the value before it.

    Attributes:
        num_tokens: predicted tokens that were counted.
        ln_ppl_ratio: ln(PPL(Q) / PPL(base)); `ppl_difference` is PPL(Q) - PPL(base).
        correlation: of the two models' ln p of the right tokens, -1 to 1.
        kl_mean: nats a token; `kl_percentiles` by name, "maximum" to "minimum".
        delta_p_mean: change of the right token's probability, as a share (llama-perplexity prints it in percent); `_rms` its root mean square.
        top1: share of tokens where both models find the same token likeliest.
        by_position: from the beginnings of texts on, each part twice as long as the one before; empty where positions were not told.
    """

    num_tokens: int
    ppl_baseline: float
    ppl_baseline_se: float
    ppl_quantized: float
    ppl_quantized_se: float
    ppl_ratio: float
    ppl_ratio_se: float
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float
    ppl_difference: float
    ppl_difference_se: float
    correlation: float
    kl_mean: float
    kl_se: float
    kl_percentiles: dict[str, float]
    delta_p_mean: float
    delta_p_mean_se: float
    delta_p_rms: float
    delta_p_rms_se: float
    delta_p_percentiles: dict[str, float]
    top1: float
    top1_se: float
    by_position: list[PositionResult] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not a number is None."""
        return _json_values(asdict(self))


@dataclass(eq=False, slots=True)
class Perplexity:
    """Collects one model's losses, batch by batch."""

    _nll: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor, counted: Tensor) -> None:
        """Take a batch; see `Divergence.add`."""
        for chunk, target in _chunks(targets, counted, logits):
            self._nll.append(-_log_softmax(chunk[0], "the model").gather(-1, target[:, None])[:, 0].cpu())

    def result(self) -> PerplexityResult:
        """Raises UsageError when no token was counted."""
        nll = _joined(self._nll)
        mean, error = mean_and_error(nll)
        return PerplexityResult(len(nll), _exp(mean), _exp(mean) * error)


@dataclass(eq=False, slots=True)
class Divergence:
    """Collects what two models say of the same tokens, batch by batch; keeps 21 bytes a token."""

    _nll_baseline: list[Tensor] = field(default_factory=list)
    _nll_quantized: list[Tensor] = field(default_factory=list)
    _kl: list[Tensor] = field(default_factory=list)
    _same_top: list[Tensor] = field(default_factory=list)
    _positions: list[Tensor] = field(default_factory=list)

    def add(
        self, baseline_logits: Tensor, quantized_logits: Tensor, targets: Tensor, counted: Tensor, positions: Tensor | None = None
    ) -> None:
        """Take a batch.

        Args:
            baseline_logits, quantized_logits: [..., V] of any float type, on one device.
            targets: int64 [...], the token that the logits at the same place predict.
            counted: bool [...]; the other places are not looked at.
            positions: int64 [...], the places' own in their texts, for the results by position; in all batches or in none.

        Raises:
            CheckpointError: a model gives logits that are not finite; the message says which model.
        """
        if positions is not None:
            self._positions.append(positions.reshape(-1)[counted.reshape(-1)].cpu())
        for (base, quantized), target in _chunks(targets, counted, baseline_logits, quantized_logits):
            ln_p = _log_softmax(base, "the baseline model")
            ln_q = _log_softmax(quantized, "the quantized model")
            self._kl.append((ln_p.exp() * (ln_p - ln_q)).sum(-1).cpu())
            self._nll_baseline.append(-ln_p.gather(-1, target[:, None])[:, 0].cpu())
            self._nll_quantized.append(-ln_q.gather(-1, target[:, None])[:, 0].cpu())
            self._same_top.append((ln_p.argmax(-1) == ln_q.argmax(-1)).cpu())

    @property
    def kl_values(self) -> Tensor:
        """float32 [num_tokens], in the order in which tokens were added: for paired comparisons of two quantized models."""
        return torch.cat(self._kl) if self._kl else torch.zeros(0)

    def result(self) -> DivergenceResult:
        """Raises UsageError when no token was counted."""
        kl, nll_baseline, nll_quantized = _joined(self._kl), _joined(self._nll_baseline), _joined(self._nll_quantized)
        delta_p = (-nll_quantized).exp() - (-nll_baseline).exp()
        kl_mean, kl_se = mean_and_error(kl)
        delta_mean, delta_mean_se = mean_and_error(delta_p)
        delta_square, delta_square_se = mean_and_error(delta_p.square())
        delta_rms = math.sqrt(delta_square)
        top1 = _joined(self._same_top).mean().item()
        return DivergenceResult(
            num_tokens=len(kl),
            **_perplexities(nll_baseline, nll_quantized),
            kl_mean=kl_mean,
            kl_se=kl_se,
            kl_percentiles=percentiles(kl, _KL_PERCENTILES),
            delta_p_mean=delta_mean,
            delta_p_mean_se=delta_mean_se,
            delta_p_rms=delta_rms,
            delta_p_rms_se=0.5 / delta_rms * delta_square_se if delta_rms else 0.0,
            delta_p_percentiles=percentiles(delta_p, _DELTA_P_PERCENTILES),
            top1=top1,
            top1_se=math.sqrt(top1 * (1 - top1) / (len(kl) - 1)) if len(kl) > 1 else math.nan,
            by_position=_by_position(torch.cat(self._positions), kl, nll_baseline, nll_quantized) if self._positions else [],
        )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of float64 values [n] and its standard error, std / sqrt(n - 1); the error of a single value is NaN."""
    error = values.std(correction=0).item() / math.sqrt(len(values) - 1) if len(values) > 1 else math.nan
    return values.mean().item(), error


def percentiles(values: Tensor, fractions: dict[str, float]) -> dict[str, float]:
    """Values [n] at these fractions of their sorted order, linearly interpolated."""
    ordered = values.sort().values
    places = {name: fraction * (len(values) - 1) for name, fraction in fractions.items()}
    return {name: torch.lerp(ordered[math.floor(p)], ordered[math.ceil(p)], p - math.floor(p)).item() for name, p in places.items()}


def _by_position(positions: Tensor, kl: Tensor, nll_baseline: Tensor, nll_quantized: Tensor) -> list[PositionResult]:
    found, start, end = [], 0, _FIRST_POSITIONS
    while start <= int(positions.max()):
        here = (positions >= start) & (positions < end)
        if here.any():
            both = _perplexities(nll_baseline[here], nll_quantized[here])
            kept = {name: both[name] for name in ("ppl_baseline", "ppl_quantized", "ln_ppl_ratio", "ln_ppl_ratio_se")}
            kl_mean, kl_se = mean_and_error(kl[here])
            found.append(PositionResult(start, min(end, int(positions.max()) + 1), int(here.sum()), **kept, kl_mean=kl_mean, kl_se=kl_se))
        start, end = end, 2 * end
    return found


def _perplexities(nll_baseline: Tensor, nll_quantized: Tensor) -> dict[str, float]:
    """Both perplexities, their ratio and difference; errors allow for the likeness of the two models' losses."""
    count = len(nll_baseline)
    (ln_base, ln_base_se), (ln_quant, ln_quant_se) = mean_and_error(nll_baseline), mean_and_error(nll_quantized)
    covariance = ((nll_baseline - ln_base) * (nll_quantized - ln_quant)).mean().item() / (count - 1) if count > 1 else math.nan
    base, quant, ratio = _exp(ln_base), _exp(ln_quant), _exp(ln_quant - ln_base)
    ln_ratio_se = _root(ln_base_se**2 + ln_quant_se**2 - 2 * covariance)
    spread = ln_base_se * ln_quant_se
    return {
        "ppl_baseline": base, "ppl_baseline_se": base * ln_base_se,
        "ppl_quantized": quant, "ppl_quantized_se": quant * ln_quant_se,
        "ppl_ratio": ratio, "ppl_ratio_se": ratio * ln_ratio_se,
        "ln_ppl_ratio": ln_quant - ln_base, "ln_ppl_ratio_se": ln_ratio_se,
        "ppl_difference": quant - base,
        "ppl_difference_se": _root((base * ln_base_se) ** 2 + (quant * ln_quant_se) ** 2 - 2 * base * quant * covariance),
        "correlation": covariance / spread if spread else math.nan,
    }  # fmt: skip


def _chunks(targets: Tensor, counted: Tensor, *logits: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The counted places of all logits, a bounded number at a time: ([n, V] of each, targets [n])."""
    places = counted.reshape(-1).nonzero()[:, 0].to(logits[0].device)
    flat = [t.reshape(-1, t.shape[-1]) for t in logits]
    target = targets.reshape(-1).to(logits[0].device)
    for part in places.split(max(1, _CHUNK // logits[0].shape[-1])):
        yield [t[part] for t in flat], target[part]


def _log_softmax(logits: Tensor, whose: str) -> Tensor:
    logits = logits.float()
    if not torch.isfinite(logits).all():
        fault = "NaN" if torch.isnan(logits).any() else "infinite values"
        raise CheckpointError(f"{whose} gives {fault} where it should give logits: its weights or scales are damaged, or overflow in their type")
    return logits.log_softmax(-1)


def _joined(values: list[Tensor]) -> Tensor:
    """All values as float64 [n]."""
    joined = torch.cat(values).double() if values else torch.zeros(0)
    if not len(joined):
        raise UsageError("no token was measured: every text is shorter than two tokens, or nothing was counted")
    return joined


def _exp(value: float) -> float:
    """A model that is broken enough has a perplexity beyond all floats; that is a result and no fault."""
    return math.exp(value) if value < 700 else math.inf


def _root(square: float) -> float:
    """The root of a variance that rounding may have left just below zero."""
    return math.sqrt(max(square, 0.0)) if not math.isnan(square) else math.nan


def _json_values(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_values(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_json_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
