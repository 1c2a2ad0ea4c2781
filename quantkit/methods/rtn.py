"""Roundings that look at the weight alone: round-to-nearest, and round-to-nearest on a searched grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor, from_grid
from quantkit.core.quantize import as_groups, range_grid, search_grid
from quantkit.core.scheme import QuantSpec
from quantkit.methods.base import Statistics


@dataclass(frozen=True, slots=True)
class RoundToNearest:
    """Scales span the largest weight of each group; nothing is searched."""

    needs_calibration = False

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        groups = as_groups(weight, spec)
        grid = range_grid(groups, spec, scale_dtype)
        return from_grid(spec, grid.codes(groups, spec.max_code).reshape(weight.shape), grid, scale_dtype)


@dataclass(frozen=True, slots=True)
class SearchedScales:
    """Scales of least squared error, each error weighted by the mean square of its input where calibration saw it."""

    needs_calibration = False

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        groups = as_groups(weight, spec)
        importance = None if statistics is None else as_groups(statistics.hessian.diagonal()[None], spec)
        grid = search_grid(groups, spec, scale_dtype, importance)
        return from_grid(spec, grid.codes(groups, spec.max_code).reshape(weight.shape), grid, scale_dtype)
