"""How scales are stored, and what a scale becomes by being stored: plain floats, 8-bit floats under one float32, powers of two, codes of codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.dynamic_map import dynamic_map, nearest_code
from quantkit.core.levels import E4M3_TOP, to_e4m3, top_level
from quantkit.core.scheme import QuantSpec

NESTED_BLOCK = 256
"""Scales that share an outer scale in double quantization."""
_SMALLEST_E4M3 = 2.0**-9
_STORED = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu, "nested": torch.uint8, "row maximum": torch.float32}


def stored_dtype(spec: QuantSpec, dtype: torch.dtype) -> torch.dtype:
    """The type of the stored scales, where the container keeps plain ones in `dtype`."""
    return _STORED.get(spec.scale, dtype)


@dataclass(frozen=True, slots=True)
class ScaleType:
    """The stored type of one tensor's scales.

    Attributes:
        dtype: a float type, float8_e4m3fn, or float8_e8m0fnu for powers of two.
        divisor: what stored scales are divided by: NVFP4's `weight_global_scale`, 127 where the largest magnitude is stored, 1 elsewhere.
    """

    dtype: torch.dtype
    divisor: float = 1.0

    @classmethod
    def of(cls, spec: QuantSpec, dtype: torch.dtype, weight: Tensor) -> ScaleType:
        """For a weight [N, K] whose container stores plain scales in `dtype`."""
        if spec.scale == "e4m3":
            largest = float(weight.abs().max()) or 1.0
            return cls(stored_dtype(spec, dtype), float(torch.tensor(E4M3_TOP * top_level(spec) / largest, dtype=torch.float32)))
        if spec.scale == "row maximum":
            return cls(stored_dtype(spec, dtype), top_level(spec))
        return cls(torch.float32 if spec.scale == "nested" else stored_dtype(spec, dtype))

    def stored(self, scale: Tensor) -> Tensor:
        """The scale as it will be stored, back in float32: rounded to its type, never zero, never infinite."""
        if self.dtype == torch.float8_e8m0fnu:
            return torch.exp2(torch.log2(scale.abs().clamp(min=2.0**-126)).round().clamp(-126, 127))
        if self.dtype == torch.float8_e4m3fn:
            return to_e4m3((scale.abs() * self.divisor).clamp(min=_SMALLEST_E4M3)).float() / self.divisor
        return stored_scale(scale, self.dtype)

    def write(self, scale: Tensor) -> Tensor:
        """The stored tensor of scales that `stored` has been through."""
        return (scale * self.divisor).to(self.dtype) if self.divisor != 1.0 else scale.to(self.dtype)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in a plain float type, back in float32: rounded to its type, never zero, never infinite.

    Half precision goes down into its subnormals, which small weights at 8 bits need.
    """
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    magnitude = scale.abs().clamp(smallest, info.max)
    return torch.where(scale < 0, -magnitude, magnitude).to(dtype).float()


@dataclass(eq=False, slots=True)
class NestedScales:
    """Double quantization (arXiv 2305.14314, as bitsandbytes does it): scales = table[codes] * outer[block of 256] + offset.

    Attributes:
        outer: float32 [ceil(S / 256)] for S scales.
        offset: their mean, float32 [].
        table: float32 [256].
    """

    outer: Tensor
    offset: Tensor
    table: Tensor

    def scales(self, codes: Tensor) -> Tensor:
        """float32 [S] of uint8 codes [S]."""
        outer = self.outer.repeat_interleave(NESTED_BLOCK)[: codes.shape[0]]
        return self.table[codes.long()] * outer + self.offset

    def to(self, device: torch.device | str) -> NestedScales:
        return NestedScales(self.outer.to(device), self.offset.to(device), self.table.to(device))


def nest(scale: Tensor) -> tuple[Tensor, NestedScales]:
    """uint8 codes [S] of float32 scales [S], and what they stand for."""
    offset = scale.mean()
    padded = torch.nn.functional.pad(scale - offset, (0, -scale.shape[0] % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    outer = padded.abs().amax(1)
    table = dynamic_map().to(scale.device)
    codes = nearest_code((padded * (1.0 / outer.clamp(min=1e-38))[:, None]).clamp(-1, 1), table)
    return codes.flatten()[: scale.shape[0]].contiguous(), NestedScales(outer, offset, table)
