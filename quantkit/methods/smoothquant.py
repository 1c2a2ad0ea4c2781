"""Smoothing (SmoothQuant: Xiao et al., arXiv 2211.10438): where inputs are quantized too, their outliers are moved into the weights.

An input channel's scale is its largest magnitude to the power alpha over the largest magnitude of its column to the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import RecipeError
from quantkit.given import is_number
from quantkit.methods.base import Reader, Rounding

_SMALLEST = 1e-5


@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """Attributes: alpha, the share of the difficulty that moves from inputs to weights."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha is {self.alpha!r}; give a share from 0 to 1, such as 0.5")

    def scale(self, readers: Sequence[Reader], index: Tensor, count: int) -> Tensor:
        """See Transform."""
        index = index.to(readers[0].weight.device)
        inputs = torch.stack([reader.statistics.largest for reader in readers if reader.statistics.largest is not None]).amax(0)
        columns = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
        inputs, columns = (_largest(values, index, count).clamp(min=_SMALLEST) for values in (inputs, columns))
        return inputs**self.alpha / columns ** (1 - self.alpha)

    def rounding(self, rounding: Rounding) -> Rounding:
        return rounding


def _largest(values: Tensor, index: Tensor, count: int) -> Tensor:
    """The largest of the values [K] under each scale; [count]."""
    return torch.zeros(count, device=values.device).scatter_reduce(0, index, values, "amax")
