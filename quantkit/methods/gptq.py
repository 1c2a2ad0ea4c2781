"""GPTQ: round column by column and let the columns not yet rounded make up for the error (Frantar et al., arXiv 2210.17323).

The inverse Hessian's Cholesky factor says how. Columns are visited in an order of importance, but codes are written in the original column
order, so that no permutation is stored ("static" act-order). Scales are searched under the weight that an error of each column has after
compensation, and the result is then descended to a nearby minimum of the same objective (methods/descent.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from quantkit.core.groups import as_groups
from quantkit.core.levels import nearest_level
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.quantize import Grid, column_weights, from_grid, range_grid, rounded, search_grid
from quantkit.core.scales import ScaleType
from quantkit.core.scheme import QuantSpec
from quantkit.errors import CalibrationError, RecipeError, did_you_mean
from quantkit.given import is_number
from quantkit.methods.base import Statistics
from quantkit.methods.descent import descend
from quantkit.methods.propagation import propagated

Order = Literal["group", "static", "none"]
PROPAGATED = 0.4
"""The share of a drift that is best made up for. KL of stories3m on text not calibrated on, 4 bits in groups of 64, two draws of evals/peers:
none 0.112 and 0.113, 0.2 0.099 and 0.100, 0.4 0.095 and 0.095, 0.7 0.102 and 0.103, all of it 0.143 and 0.140."""


@dataclass(frozen=True, slots=True)
class GPTQ:
    """Calibrated rounding.

    Attributes:
        damp: share of the mean diagonal added to the Hessian; raised tenfold, up to 1, while the factorization fails.
        order: "group" visits groups, and columns in them, by falling importance and searches a group's scales when it is reached; "static"
            visits columns of all groups by importance with scales searched beforehand; "none" goes from left to right.
        search: search each group's scale instead of spanning its largest weight. A column's error is weighed by what it costs once the columns
            behind it have made up for it, not by its input's mean square alone (llama.cpp's and others' importance matrix). KL so and so: the
            reference model in groups of 128 0.0100 and 0.0103 at 4 bits, 0.0458 and 0.0487 at 3; stories3m in groups of 64, two draws, 0.112 and
            0.113 against 0.112 and 0.115 at 4, 0.463 twice against 0.473 and 0.478 at 3, but 1.63 and 1.65 against 1.59 and 1.63 at 2.
        descent: passes of coordinate descent over codes and scales afterwards; 0 for plain GPTQ.
        block: columns whose updates are gathered before they reach the rest of the matrix.
        propagate: how much of what the layers before have lost is made up for, from 0 to 1 (methods/propagation.py); needs the original model's
            states, so calibration takes two passes more. Layers that other tokens reach in the original model, experts mostly, are left out.
    """

    damp: float = 0.01
    order: Order = "group"
    search: bool = True
    descent: int = 4
    block: int = 128
    propagate: float = 0.0
    needs_calibration = True

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise RecipeError(f"unknown order {self.order!r}; {did_you_mean(str(self.order), get_args(Order))}")
        if not is_number(self.damp) or not 0 < self.damp <= 1:
            raise RecipeError(f"damp is {self.damp!r}; give a share of the mean diagonal above 0 and up to 1, such as 0.01")
        if not isinstance(self.search, bool):
            raise RecipeError(f"search is {self.search!r}; give true or false")
        if type(self.descent) is not int or self.descent < 0:
            raise RecipeError(f"descent is {self.descent!r}; give a number of passes, 0 for none")
        if type(self.block) is not int or self.block < 1:
            raise RecipeError(f"block is {self.block!r}; give a number of columns, such as 128")
        if not is_number(self.propagate) or not 0 <= self.propagate <= 1:
            raise RecipeError(f"propagate is {self.propagate!r}; give a share from 0 to 1, such as {PROPAGATED}")

    @property
    def needs_original(self) -> bool:
        return self.needs_drift

    @property
    def needs_drift(self) -> bool:
        return self.propagate > 0

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        """Raises CalibrationError when the Hessian is not finite, or no damping makes it positive definite.

        Where rows share scales these are searched beforehand and stay. Blocks that run over the ends of rows are rounded to nearest.
        """
        assert statistics is not None
        if not bool(torch.isfinite(statistics.hessian).all()):
            cause = "most likely a weight before it is far out of range and the model damaged"
            raise CalibrationError(f"the squares of its inputs overflow on calibration data; {cause}")
        if spec.is_flat and weight.shape[1] % spec.group_size(weight.shape[1]):
            return rounded(weight, spec, scale_dtype, search=self.search, importance=statistics.hessian.diagonal())
        scales = ScaleType.of(spec, scale_dtype, weight)
        diagonal = _without_dead(statistics.hessian.diagonal())
        order = visiting_order(diagonal, spec, self.order)
        hessian = statistics.hessian[order[:, None], order]
        hessian.diagonal().copy_(diagonal[order])
        factor, damp = inverse_factor(hessian, self.damp)
        del hessian
        if self.propagate and statistics.drift is not None:
            weight = propagated(weight, statistics.drift, factor, order, share=self.propagate)
        shared = self._shared_grid(weight, diagonal, spec, scales) if spec.spans_rows else None
        of_rows = None if shared is None else _row_by_row(shared, spec, weight.shape)
        levels, grid = self._round(weight[:, order], factor, order, spec, scales, of_rows)
        del factor
        levels = levels[:, torch.argsort(order)]
        if self.descent:
            damped = statistics.hessian.clone()
            damped.diagonal().copy_(diagonal + damp * diagonal.mean())
            levels, grid = descend(weight, damped, levels, grid, spec, scales if shared is None else None, passes=self.descent)
        return from_grid(spec, levels, grid if shared is None else shared, scales)

    def _shared_grid(self, weight: Tensor, diagonal: Tensor, spec: QuantSpec, scales: ScaleType) -> Grid:
        groups = as_groups(weight, spec)
        grid = search_grid(groups, spec, scales, column_weights(diagonal, spec, weight.shape)) if self.search else range_grid(groups, spec, scales)
        return grid.doubly_quantized() if spec.scale == "nested" else grid

    def _round(
        self, weight: Tensor, factor: Tensor, order: Tensor, spec: QuantSpec, scales: ScaleType, fixed: Grid | None
    ) -> tuple[Tensor, Grid]:
        """Levels [N, K] in visiting order and the grid [N, G, 1] in original group order, `fixed` where that is given. Consumes `weight`."""
        columns = weight.shape[1]
        size = spec.group_size(columns)
        group_of = (order // size).tolist()
        importance = factor.diagonal().pow(-2)
        grid = fixed or self._grid_beforehand(weight, importance, order, spec, scales)
        levels = torch.empty_like(weight)
        for start in range(0, columns, self.block):
            end = min(start + self.block, columns)
            block, local = weight[:, start:end], factor[start:end, start:end]
            errors = torch.empty_like(block)
            for i in range(end - start):
                column = start + i
                if fixed is None and self._reaches_group(column, size):
                    self._search_group(grid, group_of[column], weight, column, size, importance, factor, (start, i, errors), spec, scales)
                scale, zero = grid.scale[:, group_of[column], 0], grid.zero[:, group_of[column], 0]
                level = nearest_level(block[:, i] / scale, spec, zero)
                levels[:, column] = level
                errors[:, i] = (block[:, i] - level * scale) / local[i, i]
                block[:, i + 1 :] -= errors[:, i, None] * local[i, None, i + 1 :]
            weight[:, end:] -= errors @ factor[start:end, end:]
        return levels, grid

    def _reaches_group(self, column: int, size: int) -> bool:
        return self.order != "static" and column % size == 0

    def _grid_beforehand(self, weight: Tensor, importance: Tensor, order: Tensor, spec: QuantSpec, scales: ScaleType) -> Grid:
        back = torch.argsort(order)
        groups = as_groups(weight[:, back], spec)
        if self.order == "static" and self.search:
            return search_grid(groups, spec, scales, as_groups(importance[back][None], spec))
        return range_grid(groups, spec, scales)

    def _search_group(self, grid: Grid, group: int, weight: Tensor, column: int, size: int, importance: Tensor, factor: Tensor,
                      pending: tuple[int, int, Tensor], spec: QuantSpec, scales: ScaleType) -> None:
        """Set the grid of the group that starts at this column from its weights as compensated so far."""
        start, done, errors = pending
        members = weight[:, column : column + size]
        end = start + errors.shape[1]
        if column + size > end:  # columns beyond this block have not received its errors yet
            late = members[:, end - column :] - errors[:, :done] @ factor[start : start + done, end : column + size]
            members = torch.cat([members[:, : end - column], late], dim=1)
        members = members[:, None]
        weights = importance[column : column + size][None, None]
        found = search_grid(members, spec, scales, weights) if self.search else range_grid(members, spec, scales)
        grid.scale[:, group] = found.scale[:, 0]
        grid.zero[:, group] = found.zero[:, 0]


def _row_by_row(grid: Grid, spec: QuantSpec, shape: tuple[int, int]) -> Grid:
    """A grid whose scales rows share, as [N, G, 1] with a scale for every row and run of columns."""
    rows, columns = shape
    if spec.is_flat:
        scale = grid.scale.reshape(rows, -1, 1)
    else:
        high = spec.group[0] if isinstance(spec.group, tuple) else rows
        scale = grid.scale.repeat_interleave(high, dim=0)
    assert scale.shape[1] == spec.num_groups(columns)
    return Grid(scale, torch.full_like(scale, spec.mid_code))


def visiting_order(importance: Tensor, spec: QuantSpec, order: Order) -> Tensor:
    """The columns [K] in the order in which they are rounded."""
    columns = importance.shape[0]
    if order == "none":
        return torch.arange(columns, device=importance.device)
    if order == "static":
        return torch.argsort(importance, descending=True, stable=True)
    groups = importance.view(spec.num_groups(columns), -1)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    first = torch.argsort(groups.sum(1), descending=True, stable=True)
    return (inside + torch.arange(groups.shape[0], device=importance.device)[:, None] * groups.shape[1])[first].flatten()


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """The upper U with U^T U = (H + damping)^-1, and the share of the mean diagonal that it took.

    With J the reversal of rows, J H J = L L^T gives U = J L^-1 J: one factorization and one triangular inverse.
    """
    while True:
        factor = _factor(hessian, damp)
        if factor is not None:
            return factor, damp
        if damp >= 1:
            reason = "the Hessian of its inputs has no Cholesky factor even at full damping"
            raise CalibrationError(f"{reason}; calibrate on other text or in float32")
        damp = min(damp * 10, 1.0)


def _factor(hessian: Tensor, damp: float) -> Tensor | None:
    """In float64 on the CPU, where it costs little and needs less damping. At most two such matrices are there at a time beside `hessian`."""
    dtype = torch.float64 if hessian.device.type == "cpu" else hessian.dtype
    lower = hessian.flip(0, 1).to(dtype)
    lower.diagonal().add_(damp * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(lower)
    if failed or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    inverse = torch.eye(len(lower), dtype=dtype, device=lower.device)
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    factor = inverse.to(hessian.dtype).flip(0, 1)
    return factor if bool(torch.isfinite(factor).all()) else None


def _without_dead(diagonal: Tensor) -> Tensor:
    """The Hessian's diagonal with its mean for inputs that were never on: their weights are then rounded to nearest."""
    dead = diagonal <= 0
    alive = diagonal[~dead]
    return torch.where(dead, alive.mean() if alive.numel() else torch.ones_like(diagonal), diagonal)
