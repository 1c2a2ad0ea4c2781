"""Linear layers of 8-bit weights with one scale a row, the weight held as int8.

Few tokens go through torch's own CPU operator, which is fast with bfloat16 activations only; many through a product of the codes as floats, as
turning them costs less there than the operator loses. Codes are whole numbers up to 128, so both take them exactly; scales are applied after.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

FEW = 8
FEW_WITHOUT_BFLOAT16 = 64
"""Tokens up to which the operator is faster (Zen 4 with AVX512-BF16, Zen 3 without)."""


def why_not(rows: int, columns: int) -> str | None:
    if columns % 32 or rows % 16:
        return f"a weight of {rows} x {columns}; it takes columns in multiples of 32 and rows in multiples of 16"
    return None


def pack(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] that mean zero at 128, and scale [N, 1]: int8 [N, K] and float32 [N]."""
    return (codes ^ 0x80).view(torch.int8), scale.float().flatten()


def linear(x: Tensor, codes: Tensor, scale: Tensor, *, fast_bfloat16: bool) -> Tensor:
    """[M, K] by the packed weight, [M, N] in x's type. `fast_bfloat16`: the processor multiplies bfloat16 natively."""
    if len(x) <= (FEW if fast_bfloat16 else FEW_WITHOUT_BFLOAT16):
        y = torch._weight_int8pack_mm(x.bfloat16(), codes, torch.ones_like(scale, dtype=torch.bfloat16))
    else:
        dtype = torch.bfloat16 if fast_bfloat16 else torch.float32
        y = functional.linear(x.to(dtype), codes.to(dtype))
    return (y.float() * scale).to(x.dtype)
