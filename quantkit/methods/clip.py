"""Round-to-nearest with each group's range shrunk to where its linears' output errs least (the clipping of AWQ, arXiv 2306.00978).

Ends of a group are cut to a share of its largest weight, both alike, and the grid spans what is left. The error counted is that of the output
for the inputs seen, group by group: e H_gg e^T with the group's own block of the Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.groups import as_groups
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.quantize import nearest_on, range_grid
from quantkit.core.scales import ScaleType
from quantkit.core.scheme import QuantSpec
from quantkit.methods.base import Statistics
from quantkit.methods.rtn import RoundToNearest


@dataclass(frozen=True, slots=True)
class ClippedToNearest:
    """Attributes: how many ranges are tried, and the smallest of them as a share of the whole. Groups that span rows are left whole."""

    steps: int = 20
    smallest: float = 0.5
    needs_calibration = False
    needs_original = False
    needs_drift = False

    def __call__(self, weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, statistics: Statistics | None) -> QuantizedTensor:
        if statistics is None or spec.spans_rows:
            return RoundToNearest()(weight, spec, scale_dtype, None)
        groups, scales, blocks = as_groups(weight, spec), ScaleType.of(spec, scale_dtype, weight), _blocks(statistics.hessian, spec)
        ends = torch.stack([groups.amin(-1), groups.amax(-1)], dim=-1)
        limit = ends.abs().amax(-1, keepdim=True)
        best, least = limit, torch.full_like(limit, torch.inf)
        for share in torch.linspace(1.0, self.smallest, self.steps).tolist():
            grid = range_grid(_cut(ends, limit * share), spec, scales)
            error = output_error(grid.values(grid.nearest(groups, spec)).sub_(groups), blocks)
            best, least = torch.where(error < least, limit * share, best), torch.minimum(error, least)
        return nearest_on(weight, spec, range_grid(_cut(ends, best), spec, scales), scales)


def output_error(difference: Tensor, blocks: Tensor) -> Tensor:
    """e H_gg e^T of errors [N, G, g] under blocks [G, g, g]; [N, G, 1]."""
    groups = difference.transpose(0, 1)  # [G, N, g]
    return ((groups @ blocks) * groups).sum(-1, keepdim=True).transpose(0, 1)


def _blocks(hessian: Tensor, spec: QuantSpec) -> Tensor:
    """The diagonal blocks [G, g, g] of a Hessian [K, K]."""
    size = spec.group_size(len(hessian))
    return torch.stack([hessian[start : start + size, start : start + size] for start in range(0, len(hessian), size)])


def _cut(ends: Tensor, limit: Tensor) -> Tensor:
    """The smallest and largest weight of every group [N, G, 2], neither beyond the limit [N, G, 1]: a grid is spanned by no more than these."""
    return torch.minimum(torch.maximum(ends, -limit), limit)
