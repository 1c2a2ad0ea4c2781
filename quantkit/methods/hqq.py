"""Half-quadratic quantization (Badri & Shaji 2023): scales and zero points of least |error|^p, p < 1, with no calibration.

A norm below 1 lets a few outliers go and fits the many. It is split in two as there: what a generalized soft threshold takes for outliers is put
aside, and the rest is fitted by least squares, in turn. Their zero points are real numbers and their scales stay; here zero points are codes, as
containers store them, so both are fitted, and errors are counted in steps of the grid, so that a weight's size does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.groups import as_groups, from_groups
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.quantize import Grid, from_grid, range_grid
from quantkit.core.scales import ScaleType
from quantkit.core.scheme import QuantSpec
from quantkit.errors import RecipeError
from quantkit.methods.base import Statistics

_STARTS = (1.0, 0.85, 0.7)
"""Shares of each group's range from which the way begins: the error has many minima."""


@dataclass(frozen=True, slots=True)
class HalfQuadratic:
    """Round to nearest on the grid that half-quadratic splitting finds.

    Attributes:
        p: the norm.
        steps: turns of putting aside and fitting.
        beta: how firmly what is put aside is held to the error; grows by `growth` a turn.
    """

    p: float = 0.7
    steps: int = 20
    beta: float = 10.0
    growth: float = 1.05
    needs_calibration = False

    def __post_init__(self) -> None:
        if not isinstance(self.p, int | float) or not 0 < self.p <= 1:
            raise RecipeError(f"p is {self.p!r}; give a norm above 0 and up to 1, such as 0.7")
        if type(self.steps) is not int or self.steps < 0:
            raise RecipeError(f"steps is {self.steps!r}; give a whole number from 0 on, such as 20")
        for name, least in (("beta", 0.0), ("growth", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= least or value == 0:
                raise RecipeError(f"{name} is {value!r}; give a number {'above 0' if least == 0 else 'from 1 on'}")

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        scales, groups = ScaleType.of(spec, scale_dtype, weight), as_groups(weight, spec)
        best = range_grid(groups, spec, scales)
        least = self.error(groups, best, spec)
        for share in _STARTS:
            grid, beta = range_grid(groups * share, spec, scales), self.beta
            for _ in range(self.steps):
                error = self.error(groups, grid, spec)
                best, least = _kept(error < least, grid, best), torch.minimum(error, least)
                grid, beta = self._refitted(groups, grid, spec, scales, beta), beta * self.growth
        grid = best.doubly_quantized() if spec.scale == "nested" else best
        return from_grid(spec, from_groups(grid.nearest(groups, spec), spec, weight.shape), grid, scales)

    def error(self, groups: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
        """The sum of |error|^p, [R, G, 1] for groups [R, G, g]."""
        return (grid.values(grid.nearest(groups, spec)) - groups).abs().pow(self.p).sum(-1, keepdim=True)

    def _refitted(self, groups: Tensor, grid: Grid, spec: QuantSpec, scales: ScaleType, beta: float) -> Grid:
        """The grid of least squares for the levels there are, once outliers are put aside."""
        levels = grid.nearest(groups, spec)
        wanted = groups / grid.scale
        wanted = wanted - soft_threshold(wanted - levels, self.p, beta)
        zero = grid.zero
        if not spec.symmetric:
            zero = torch.clamp(torch.round((levels + zero - wanted).mean(-1, keepdim=True)), 0, spec.max_code)
            levels = levels + grid.zero - zero
        power = levels.square().sum(-1, keepdim=True)
        scale = grid.scale * torch.where(power > 0, (levels * wanted).sum(-1, keepdim=True) / power.clamp(min=1e-30), 1.0)
        return Grid(scales.stored(torch.where(scale == 0, grid.scale, scale)), zero)


def soft_threshold(x: Tensor, p: float, beta: float) -> Tensor:
    """sign(x) max(0, |x| - |x|^(p-1) / beta): to about the minimum of |e|^p + beta/2 (e - x)^2 (Badri & Shaji 2023, eq. 5)."""
    magnitude = x.abs()
    return torch.sign(x) * torch.relu(magnitude - magnitude.clamp(min=1e-12).pow(p - 1) / beta)


def _kept(wins: Tensor, grid: Grid, best: Grid) -> Grid:
    return Grid(torch.where(wins, grid.scale, best.scale), torch.where(wins, grid.zero, best.zero))
