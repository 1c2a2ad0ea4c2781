"""A weight cut into what shares a scale, and put together again."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.scheme import CHANNEL, QuantSpec


def as_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[N, K] as [R, G, g], one group of g values a scale; flat blocks as [1, G, g], the last filled up with zeros.

    The group size divides K, and a block both dimensions.
    """
    rows, columns = weight.shape
    if spec.is_flat:
        size = spec.group_size(columns)
        return torch.nn.functional.pad(weight.reshape(-1), (0, -rows * columns % size)).view(1, -1, size)
    if isinstance(spec.group, tuple):
        high, wide = spec.group
        blocks = weight.reshape(rows // high, high, columns // wide, wide).permute(0, 2, 1, 3)
        return blocks.reshape(rows // high, columns // wide, high * wide)
    return weight.reshape(1, 1, -1) if spec.group is None else weight.reshape(rows, spec.num_groups(columns), spec.group_size(columns))


def from_groups(groups: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """The inverse of `as_groups`."""
    rows, columns = shape
    if spec.is_flat:
        return groups.reshape(-1)[: rows * columns].view(rows, columns)
    if isinstance(spec.group, tuple):
        high, wide = spec.group
        return groups.reshape(rows // high, columns // wide, high, wide).permute(0, 2, 1, 3).reshape(rows, columns)
    return groups.reshape(rows, columns)


def expanded(per_group: Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """Values of the shape `spec.scale_shape` at every weight of [N, K]. Ragged groups at the end are cut."""
    rows, columns = shape
    if spec.is_flat:
        return per_group.repeat_interleave(spec.group_size(columns))[: rows * columns].view(rows, columns)
    if spec.group in (None, CHANNEL):
        return per_group.expand(rows, columns)
    wide = per_group.repeat_interleave(spec.group_size(columns), dim=1)[:, :columns]
    return wide.repeat_interleave(spec.group[0], dim=0)[:rows] if isinstance(spec.group, tuple) else wide
