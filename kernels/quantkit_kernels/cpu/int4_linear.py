"""Linear layers of 4-bit weights through torch's own CPU operator, which is fast with bfloat16 activations only.

Scales are held in bfloat16, as the operator wants them. Codes are packed some rows at a time: the operator that packs them takes 32-bit integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPS = (32, 64, 128, 256)
ROWS_AT_ONCE = 1024
"""A multiple of 64, the rows that the operator interleaves."""


def why_not(rows: int, columns: int, group: int) -> str | None:
    if group not in GROUPS:
        return f"groups of {group}; it takes {', '.join(map(str, GROUPS))}"
    if columns % group or rows % 16:
        return f"a weight of {rows} x {columns}; it takes whole groups and rows in multiples of 16"
    return None


def pack(codes: Tensor, scale: Tensor, zero: Tensor | int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K], scale [N, G] and zero point [N, G] in codes' units, once after loading."""
    packed = torch.empty(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8)
    for into, rows in zip(packed.split(ROWS_AT_ONCE), codes.split(ROWS_AT_ONCE), strict=True):
        into.copy_(torch._convert_weight_to_int4pack_for_cpu(rows.int(), 1))
    scale = scale.float()
    offset = (8 - zero) * scale if isinstance(zero, int) else (8 - zero.float()) * scale
    return packed, torch.stack([scale, offset], dim=-1).transpose(0, 1).contiguous().bfloat16()


def linear(x: Tensor, packed: Tensor, scales_and_zeros: Tensor, group: int) -> Tensor:
    """[M, K] by the packed weight, [M, N] in x's type."""
    return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, group, scales_and_zeros).to(x.dtype)
