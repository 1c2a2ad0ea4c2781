"""The 256 values of the dynamic 8-bit type (Dettmers, arXiv 1511.04561), in which double quantization keeps its scales.

Seven decades down from 1. A decade has twice as many values as the one below it, the lowest has one: the middles of equal parts of [0.1, 1] times its
power of ten, with both signs. Zero and one complete them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_DECADES = 7


@cache
def dynamic_map() -> Tensor:
    """float32 [256], rising."""
    positive: list[float] = []
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        positive += (10.0 ** (decade - _DECADES + 1) * middles).tolist()
    return torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]))


def nearest_code(values: Tensor, table: Tensor) -> Tensor:
    """uint8 indices into a rising table of what lies nearest to each value; halves go to the lower one."""
    return torch.bucketize(values.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
