"""What a rounding is given and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    hessian: Tensor
    num_tokens: int


class Rounding(Protocol):
    """A weight and what is known of its input, to a quantized tensor."""

    needs_calibration: bool

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        """Round float32 [N, K]; rows never influence each other, so weights with one input may be stacked."""
        ...
