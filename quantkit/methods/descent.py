"""Coordinate descent on a layer's reconstruction error over codes and scales, from wherever another method stopped.

The objective is tr((W - Q) H (W - Q)^T), GPTQ's own. Group by group, the scale moves to its least-squares value for the codes there are, then
every column's code moves to the best one with all others held (as QuantEase does for fixed grids, arXiv 2309.01885). No step raises the
objective, each pass costs about as much as GPTQ itself, and nothing about the stored format changes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkit.core.levels import nearest_level
from quantkit.core.quantize import Grid
from quantkit.core.scales import ScaleType
from quantkit.core.scheme import QuantSpec


def descend(
    weight: Tensor, hessian: Tensor, levels: Tensor, grid: Grid, spec: QuantSpec, scales: ScaleType | None, *, passes: int
) -> tuple[Tensor, Grid]:
    """Better levels [N, K] and a better grid [N, G, 1] for the float32 weight [N, K], all in the original column order.

    Args:
        scales: how scales are stored; None leaves them as they are.
    """
    columns = weight.shape[1]
    size = spec.group_size(columns)
    levels, scale = levels.clone(), grid.scale.clone()
    error = weight - _values(levels, scale, size)
    for _ in range(passes):
        changed = False
        for group, start in enumerate(range(0, columns, size)):
            end = start + size
            local = hessian[start:end, start:end]
            gradient = error @ hessian[:, start:end]  # [N, g], falls as the error does
            before = error[:, start:end].clone()
            steps = levels[:, start:end]
            if scales is not None:
                step = _scale_step(steps, scale[:, group], gradient, local, scales)
                scale[:, group] += step
                gradient -= step * (steps @ local)
            changed |= _settle(steps, scale[:, group], grid.zero[:, group], gradient, local, spec)
            error[:, start:end] = weight[:, start:end] - steps * scale[:, group]
            changed |= not torch.equal(before, error[:, start:end])
        if not changed:
            break
    return levels, replace(grid, scale=scale)


def _values(levels: Tensor, scale: Tensor, size: int) -> Tensor:
    rows, columns = levels.shape
    return (levels.view(rows, -1, size) * scale).reshape(rows, columns)


def _scale_step(steps: Tensor, scale: Tensor, gradient: Tensor, local: Tensor, scales: ScaleType) -> Tensor:
    """The change [N, 1] of the scale that lowers the objective most, once stored; zero where storing it would undo the gain."""
    slope = (steps * gradient).sum(1, keepdim=True)
    curve = ((steps @ local) * steps).sum(1, keepdim=True)
    wanted = scale + slope / curve.clamp(min=1e-30)
    keeps_sign = (wanted * scale > 0) & (curve > 0)
    step = torch.where(keeps_sign, scales.stored(wanted) - scale, torch.zeros_like(scale))
    gain = step * (2 * slope - step * curve)
    return torch.where(gain > 0, step, torch.zeros_like(step))


def _settle(levels: Tensor, scale: Tensor, zero: Tensor, gradient: Tensor, local: Tensor, spec: QuantSpec) -> bool:
    """Move each column's levels to the best ones in turn, in place. `gradient` [N, g] follows. True if any moved."""
    diagonal = local.diagonal()
    moved_any = False
    for i in range(levels.shape[1]):
        target = levels[:, i : i + 1] + gradient[:, i : i + 1] / (diagonal[i] * scale)
        best = nearest_level(target, spec, zero)
        move = best - levels[:, i : i + 1]
        levels[:, i : i + 1] = best
        gradient -= (move * scale) * local[i]
        moved_any = moved_any or bool(move.any())
    return moved_any
