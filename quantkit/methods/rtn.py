"""Roundings that look at the weight alone: round-to-nearest, and round-to-nearest on a searched grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.quantize import rounded
from quantkit.core.scheme import QuantSpec
from quantkit.methods.base import Statistics


@dataclass(frozen=True, slots=True)
class RoundToNearest:
    """Scales span the largest weight of each group; nothing is searched."""

    needs_calibration = False
    needs_original = False
    needs_drift = False

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        return rounded(weight, spec, scale_dtype, search=False)


@dataclass(frozen=True, slots=True)
class SearchedScales:
    """Scales of least squared error, each error weighted by the mean square of its input where calibration saw it."""

    needs_calibration = False
    needs_original = False
    needs_drift = False

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        importance = None if statistics is None else statistics.hessian.diagonal()
        return rounded(weight, spec, scale_dtype, search=True, importance=importance)
