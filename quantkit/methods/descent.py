"""Coordinate descent on a layer's reconstruction error over codes and scales, from wherever another method stopped.

The objective is tr((W - Q) H (W - Q)^T), GPTQ's own. Group by group, the scale moves to its least-squares value for the codes there are, then
every column's code moves to the best one with all others held (as QuantEase does for fixed grids, arXiv 2309.01885). No step raises the
objective, each pass costs about as much as GPTQ itself, and nothing about the stored format changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.quantize import Grid, stored_scale
from quantkit.core.scheme import QuantSpec


def descend(
    weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid, spec: QuantSpec, scale_dtype: torch.dtype, *, passes: int
) -> tuple[Tensor, Grid]:
    """Better codes [N, K] and a better grid [N, G, 1] for the float32 weight [N, K], all in the original column order."""
    columns = weight.shape[1]
    size = spec.group_size(columns)
    codes, scale = codes.clone(), grid.scale.clone()
    error = weight - _values(codes, scale, grid.zero, size)
    for _ in range(passes):
        changed = False
        for group, start in enumerate(range(0, columns, size)):
            end = start + size
            local = hessian[start:end, start:end]
            gradient = error @ hessian[:, start:end]  # [N, g], falls as the error does
            before = error[:, start:end].clone()
            zero = grid.zero[:, group]
            steps = codes[:, start:end] - zero
            step = _scale_step(steps, scale[:, group], gradient, local, scale_dtype)
            scale[:, group] += step
            gradient -= step * (steps @ local)
            changed |= _settle(codes[:, start:end], scale[:, group], gradient, local, spec.max_code)
            error[:, start:end] = weight[:, start:end] - (codes[:, start:end] - zero) * scale[:, group]
            changed |= not torch.equal(before, error[:, start:end])
        if not changed:
            break
    return codes, Grid(scale, grid.zero)


def _values(codes: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    rows, columns = codes.shape
    return ((codes.view(rows, -1, size) - zero) * scale).reshape(rows, columns)


def _scale_step(steps: Tensor, scale: Tensor, gradient: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """The change [N, 1] of the scale that lowers the objective most, once stored; zero where storing it would undo the gain."""
    slope = (steps * gradient).sum(1, keepdim=True)
    curve = ((steps @ local) * steps).sum(1, keepdim=True)
    wanted = scale + slope / curve.clamp(min=1e-30)
    keeps_sign = (wanted * scale > 0) & (curve > 0)
    step = torch.where(keeps_sign, stored_scale(wanted, dtype) - scale, torch.zeros_like(scale))
    gain = step * (2 * slope - step * curve)
    return torch.where(gain > 0, step, torch.zeros_like(step))


def _settle(codes: Tensor, scale: Tensor, gradient: Tensor, local: Tensor, max_code: int) -> bool:
    """Move each column's codes to the best ones in turn, in place. `gradient` [N, g] follows. True if any code moved."""
    diagonal = local.diagonal()
    moved_any = False
    for i in range(codes.shape[1]):
        target = codes[:, i : i + 1] + gradient[:, i : i + 1] / (diagonal[i] * scale)
        best = torch.clamp(torch.round(target), 0, max_code)
        move = best - codes[:, i : i + 1]
        codes[:, i : i + 1] = best
        gradient -= (move * scale) * local[i]
        moved_any = moved_any or bool(move.any())
    return moved_any
