"""The values a code stands for before it is scaled ("levels"), and the nearest of them: whole numbers, 8- and 4-bit floats, tables.

Integers: level = code - zero. E4M3 and E2M1 after OCP's formats (MX specification 1.0), halves to the even neighbour; NF4 (arXiv 2305.14314) and FP4
as bitsandbytes has them, halves to the lower one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantkit.core.scheme import Kind, QuantSpec

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""By the low three bits of a code, in twelfths."""
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_TOP = 448.0
_TOP = {"e4m3": E4M3_TOP, "e2m1": 6.0, "nf4": 1.0, "fp4": 1.0}


def top_level(spec: QuantSpec) -> float:
    """The level to which the largest weight of a symmetric grid is scaled: between the two largest codes for integers, whose sides are unlike."""
    if spec.kind != "int":
        return _TOP[spec.kind]
    return float(spec.mid_code - 1) if spec.scale == "row maximum" else spec.max_code / 2


@cache
def table(kind: Kind) -> Tensor | None:
    """float32 [2**bits], the level of every code; None for integers. E4M3 has two codes that are NaN."""
    if kind == "nf4":
        return torch.tensor(NF4)
    if kind == "fp4":
        return torch.tensor([sign * m for sign in (1.0, -1.0) for m in _FP4_MAGNITUDES]) / 12
    if kind == "e2m1":
        return torch.tensor([sign * m for sign in (1.0, -1.0) for m in _E2M1_MAGNITUDES])
    if kind == "e4m3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return None


def nearest_level(x: Tensor, spec: QuantSpec, zero: Tensor | float) -> Tensor:
    """The level nearest to each of x, weights over their scale. `zero` is the code of integers that means nothing; floats have none."""
    if spec.kind == "int":
        return torch.clamp(torch.round(x + zero), 0, spec.max_code) - zero
    if spec.kind == "e4m3":
        return to_e4m3(x).float()
    if spec.kind == "e2m1":
        return _nearest_e2m1(x)
    levels, middles, _ = _sorted(spec.kind)
    return levels.to(x.device)[torch.bucketize(x.contiguous(), middles.to(x.device))]


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest 8-bit floats; what lies beyond their range takes its end."""
    return x.clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn)


def code_of(levels: Tensor, spec: QuantSpec, zero: Tensor | float) -> Tensor:
    """uint8 codes of exact levels."""
    if spec.kind == "int":
        return (levels + zero).to(torch.uint8)
    if spec.kind == "e4m3":
        return levels.to(torch.float8_e4m3fn).view(torch.uint8)
    if spec.kind == "e2m1":
        magnitude = torch.bucketize(levels.abs().contiguous(), torch.tensor(_E2M1_MAGNITUDES, device=levels.device))
        return (magnitude + 8 * torch.signbit(levels)).to(torch.uint8)
    values, _, codes = _sorted(spec.kind)
    return codes.to(levels.device)[torch.bucketize(levels.contiguous(), values.to(levels.device))]


def level_of(codes: Tensor, spec: QuantSpec, zero: Tensor | float) -> Tensor:
    """float32 levels of uint8 codes."""
    if spec.kind == "int":
        return codes.float() - zero
    if spec.kind == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    levels = table(spec.kind)
    assert levels is not None
    return levels.to(codes.device)[codes.long()]


def _nearest_e2m1(x: Tensor) -> Tensor:
    """Steps of 1/2 below 2, of 1 below 4, of 2 up to 6; `round` takes halves to even multiples of the step, which are the even codes."""
    magnitude = x.abs().clamp(max=6.0)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


@cache
def _sorted(kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    """Levels in rising order, the middles between them, and their codes. Of FP4's two zeros the positive one is taken."""
    levels = table(kind)
    assert levels is not None
    kept = [code for code in range(len(levels)) if not (levels[code] == 0 and torch.signbit(levels[code]))]
    codes = torch.tensor(sorted(kept, key=lambda code: float(levels[code])), dtype=torch.uint8)
    values = levels[codes.long()]
    return values, (values[1:] + values[:-1]) / 2, codes
