"""A weight to a quantized tensor from its values alone, a few rows at a time, so that only the result grows with the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor, from_grid
from quantkit.core.quantize import as_groups, range_grid, search_grid
from quantkit.core.scheme import CHANNEL, QuantSpec

INT8_ROWS = QuantSpec(bits=8, group=CHANNEL)
_AT_ONCE = 1 << 18


def quantize(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, *, search: bool = True) -> QuantizedTensor:
    """A weight [N, K] of any float type on the grid that loses least, every error weighing the same, or on the one that spans its range."""
    return _joined([_round(rows.float(), spec, scale_dtype, search=search) for rows in weight.split(_rows_at_once(weight.shape[1]))])


def to_int8_rows(q: QuantizedTensor) -> QuantizedTensor:
    """The weight rounded again to 8 bits with one scale a row, nothing searched."""
    rows, at_once = q.shape[0], _rows_at_once(q.shape[1])
    parts = (q.rows(start, min(start + at_once, rows)).dequantize() for start in range(0, rows, at_once))
    return _joined([_round(part, INT8_ROWS, torch.float32, search=False) for part in parts])


def _round(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, *, search: bool) -> QuantizedTensor:
    groups = as_groups(weight, spec)
    grid = (search_grid if search else range_grid)(groups, spec, scale_dtype)
    return from_grid(spec, grid.codes(groups, spec.max_code).reshape(weight.shape), grid, scale_dtype)


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Some rows after others as one tensor."""
    zeros = [part.zero for part in parts if part.zero is not None]
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    return QuantizedTensor(parts[0].spec, codes, scale, torch.cat(zeros) if zeros else None)


def _rows_at_once(columns: int) -> int:
    return max(1, _AT_ONCE // columns)
