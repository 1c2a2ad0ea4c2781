"""What roundings and transforms are given and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantSpec


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration saw at a layer's input.

    Attributes:
        hessian: float32 [K, K], the mean of x x^T over tokens.
        num_tokens: how many tokens it is the mean of.
        mean_size: float32 [K], the mean of |x|, where a transform asks for it.
        largest: float32 [K], the largest |x|, likewise.
        drift: float32 [K, K], the mean of (o - x) x^T, where o is what the original model has in the place of x, where a rounding asks for it.
    """

    hessian: Tensor
    num_tokens: int
    mean_size: Tensor | None = None
    largest: Tensor | None = None
    drift: Tensor | None = None

    def divided(self, scale: Tensor) -> Statistics:
        """What would have been seen of inputs divided by a scale [K]."""
        sizes = (None if size is None else size / scale for size in (self.mean_size, self.largest))
        hessian, drift = (None if product is None else product / scale / scale[:, None] for product in (self.hessian, self.drift))
        return replace(self, **dict(zip(("mean_size", "largest"), sizes, strict=True)), hessian=hessian, drift=drift)


class Rounding(Protocol):
    """A weight and what is known of its input, to a quantized tensor."""

    needs_calibration: bool

    @property
    def needs_original(self) -> bool:
        """Whether the original model runs over the calibration rows too, beside the one quantized so far."""
        ...

    @property
    def needs_drift(self) -> bool:
        """Whether it does so for what `Statistics` calls drift."""
        ...

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        """Round float32 [N, K]; rows never influence each other, so weights with one input may be stacked."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Reader:
    """A weight [N, K] whose input a transform may divide by a scale, and how it will be rounded."""

    weight: Tensor
    statistics: Statistics
    spec: QuantSpec
    rounding: Rounding
    scale_dtype: torch.dtype


class Transform(Protocol):
    """A scale for inputs: they are divided by it and their readers' columns multiplied, so that the readers round better."""

    def scale(self, readers: Sequence[Reader], index: Tensor, count: int) -> Tensor:
        """Float32 [count], all above 0: scale m is that of the input channels k with index[k] = m, int64 [K]."""
        ...

    def rounding(self, rounding: Rounding) -> Rounding:
        """The rounding to use behind this transform, mostly the one given."""
        ...
