"""How far one stored weight lies from another: bit for bit the same in float32, or by how much not. A few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor

_ROWS = 512
"""Looked at together where rows can be taken apart: whole blocks of every size."""


@dataclass(frozen=True, slots=True)
class Difference:
    """From a weight W to what became of it, V.

    Attributes:
        is_finite: W has no NaN and no infinity.
        is_none: every float32 value is the same bit for bit.
        largest: max |W - V|.
        relative: ||W - V||² / ||W||².
    """

    is_finite: bool
    is_none: bool
    largest: float
    relative: float


def difference(before: QuantizedTensor | Tensor, after: QuantizedTensor | Tensor) -> Difference:
    """Between what two stored weights [N, K] dequantize to; either may be a plain one."""
    rows = before.shape[0]
    step = rows if any(isinstance(q, QuantizedTensor) and q.spec.is_flat for q in (before, after)) else _ROWS
    is_finite, is_none, largest, lost, power = True, True, 0.0, 0.0, 0.0
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        w, v = _values(before, start, stop), _values(after, start, stop)
        is_finite = is_finite and bool(torch.isfinite(w).all())
        is_none = is_none and torch.equal(w.view(torch.int32), v.view(torch.int32))
        if not is_none:
            largest = max(largest, float((w - v).abs().max()))
            lost += float((w - v).square().sum())
        power += float(w.square().sum())
    return Difference(is_finite, is_none, largest, lost / max(power, 1e-30))


def _values(weight: QuantizedTensor | Tensor, start: int, stop: int) -> Tensor:
    """float32 values of some rows, contiguous."""
    if isinstance(weight, Tensor):
        return weight[start:stop].float().contiguous()
    part = weight if (start, stop) == (0, weight.shape[0]) else weight.rows(start, stop)
    return part.dequantize().contiguous()
