"""Half-quadratic quantization (Badri & Shaji 2023): scales and zero points without calibration.

A norm below 1 lets a few outliers go and fits the many. It is split in two as there: what a generalized soft threshold takes for outliers is put
aside and the rest fitted by least squares, in turn. Their zero points are real numbers and their scales stay; containers hold whole zero points,
so here zeros are rounded within each turn and scales follow them. What is put aside is counted in steps of the grid: in a weight's own unit the
threshold puts everything aside. The norm alone would give up large weights, which cost a model most, so squares judge what it finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.groups import as_groups
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.quantize import Grid, nearest_on, range_grid
from quantkit.core.scales import ScaleType
from quantkit.core.scheme import QuantSpec
from quantkit.errors import RecipeError
from quantkit.given import is_number
from quantkit.methods.base import Statistics

_STARTS = (1.0, 0.9, 0.8, 0.7)
"""Shares of each group's range from which the way begins: the error has many minima."""
_LEAST_STRETCH = 0.1
"""A fit that would shrink a scale to less than this has lost its codes to one end of the grid."""


@dataclass(frozen=True, slots=True)
class HalfQuadratic:
    """Round to nearest on the grid that half-quadratic splitting finds.

    Of all grids on the way the one of least squared error is kept, among those whose sum of |error|^p is no higher than that of the group's range.

    Attributes:
        p: the norm.
        steps: turns of putting aside and fitting.
        beta: how firmly what is put aside is held to the error; grows by `growth` a turn.
    """

    p: float = 0.7
    steps: int = 10
    beta: float = 10.0
    growth: float = 1.05
    needs_calibration = False
    needs_original = False
    needs_drift = False

    def __post_init__(self) -> None:
        if not is_number(self.p) or not 0 < self.p <= 1:
            raise RecipeError(f"p is {self.p!r}; give a norm above 0 and up to 1, such as 0.7")
        if type(self.steps) is not int or self.steps < 1:
            raise RecipeError(f"steps is {self.steps!r}; give a whole number from 1 on, such as 10")
        if not is_number(self.beta) or not self.beta > 0:
            raise RecipeError(f"beta is {self.beta!r}; give a number above 0, such as 10")
        if not is_number(self.growth) or not self.growth >= 1:
            raise RecipeError(f"growth is {self.growth!r}; give a number from 1 on, such as 1.05")

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        scales, groups = ScaleType.of(spec, scale_dtype, weight), as_groups(weight, spec)
        best = range_grid(groups, spec, scales)
        least, most = _error(groups, best, spec, 2.0), _error(groups, best, spec, self.p)
        for share in _STARTS:
            grid, beta = range_grid(groups * share, spec, scales), self.beta
            for _ in range(self.steps):
                grid, beta = self._refitted(groups, grid, spec, scales, beta), beta * self.growth
                error = _error(groups, grid, spec, 2.0)
                wins = (error < least) & (_error(groups, grid, spec, self.p) <= most)
                best, least = grid.where(wins, best), torch.where(wins, error, least)
        grid = best.doubly_quantized() if spec.scale == "nested" else best
        return nearest_on(weight, spec, grid, scales)

    def _refitted(self, groups: Tensor, grid: Grid, spec: QuantSpec, scales: ScaleType, beta: float) -> Grid:
        """The grid of least squares for the levels there are, once outliers are put aside."""
        levels, wanted = grid.nearest(groups, spec), groups / grid.scale
        wanted = wanted - soft_threshold(wanted - levels, self.p, beta)
        zero = grid.zero if spec.symmetric else _zero(levels + grid.zero, wanted, grid.zero, spec)
        levels = levels + grid.zero - zero
        stretch = (levels * wanted).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp(min=1e-30)
        return Grid(scales.stored(torch.where(stretch > _LEAST_STRETCH, grid.scale * stretch, grid.scale)), zero)


def soft_threshold(x: Tensor, p: float, beta: float) -> Tensor:
    """sign(x) max(0, |x| - |x|^(p-1) / beta): near the minimum over e of |e|^p / p + beta / 2 (e - x)^2 (Badri & Shaji 2023, eq. 5)."""
    magnitude = x.abs()
    return torch.sign(x) * torch.relu(magnitude - magnitude.clamp(min=1e-12).pow(p - 1) / beta)


def _zero(codes: Tensor, wanted: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """The code nearest to where the line of least squares through (code, wanted) crosses nothing; the old one where codes draw no line."""
    code, value = codes.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)
    slope = ((codes - code) * (wanted - value)).sum(-1, keepdim=True) / (codes - code).square().sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.where(slope > _LEAST_STRETCH, torch.round(code - value / slope).clamp(0, spec.max_code), zero)


def _error(groups: Tensor, grid: Grid, spec: QuantSpec, p: float) -> Tensor:
    """The sum of |error|^p, [R, G, 1] for groups [R, G, g]."""
    return (grid.values(grid.nearest(groups, spec)) - groups).abs().pow(p).sum(-1, keepdim=True)
