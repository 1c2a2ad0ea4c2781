"""A weight to a quantized tensor from its values alone, a few rows at a time, so that only the result grows with the weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor, empty
from quantkit.core.quantize import rounded
from quantkit.core.scheme import CHANNEL, QuantSpec

INT8_ROWS = QuantSpec(bits=8, group=CHANNEL)
_AT_ONCE = 1 << 18


def quantize(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, *, search: bool = True) -> QuantizedTensor:
    """A weight [N, K] of any float type on the grid that loses least, every error weighing the same, or on the one that spans its range."""
    if spec.is_flat and spec.scale == "float" and weight.numel() % spec.group_size(weight.shape[1]) == 0:
        blocks = weight.reshape(-1, spec.group_size(weight.shape[1]))  # each a row, as blocks do not care for the ends of rows
        parts = (rounded(some.float(), spec, scale_dtype, search=search) for some in blocks.split(_rows_at_once(blocks.shape[1])))
        q = _joined(parts, empty(spec, blocks.shape, scale_dtype, weight.device))
        return replace(q, codes=q.codes.view(weight.shape))
    if spec.spans_rows or spec.shares_range:
        return rounded(weight.float(), spec, scale_dtype, search=search)
    parts = (rounded(rows.float(), spec, scale_dtype, search=search) for rows in weight.split(_rows_at_once(weight.shape[1])))
    return _joined(parts, empty(spec, weight.shape, scale_dtype, weight.device))


def to_int8_rows(q: QuantizedTensor) -> QuantizedTensor:
    """The weight rounded again to 8 bits with one scale a row, nothing searched."""
    rows, at_once = q.shape[0], q.shape[0] if q.spec.is_flat else _rows_at_once(q.shape[1])
    if isinstance(q.spec.group, tuple):
        at_once = max(q.spec.group[0], at_once // q.spec.group[0] * q.spec.group[0])
    values = (q.rows(start, min(start + at_once, rows)).dequantize() for start in range(0, rows, at_once))
    parts = (rounded(part, INT8_ROWS, torch.float32, search=False) for part in values)
    return _joined(parts, empty(INT8_ROWS, q.shape, torch.float32, q.codes.device))


def _joined(parts: Iterable[QuantizedTensor], whole: QuantizedTensor) -> QuantizedTensor:
    """`whole`, made before any part of it and filled with some rows after others: parts kept until the end would lie between what is freed."""
    at = 0
    for part in parts:
        of = slice(at, at := at + part.shape[0])
        whole.codes[of], whole.scale[of] = part.codes, part.scale
        if whole.zero is not None and part.zero is not None:
            whole.zero[of] = part.zero
    assert at == whole.shape[0]
    return whole


def _rows_at_once(columns: int) -> int:
    return max(1, _AT_ONCE // columns)
