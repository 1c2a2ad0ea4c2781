"""A product whose rows do not depend on how many rows there are: BLAS sums in another order for another number of rows, so it is always given 16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K] by [N, K], both float32, in tiles of 16 rows."""
    padded = functional.pad(x, (0, 0, 0, -len(x) % ROWS))
    return torch.cat([functional.linear(tile, weight) for tile in padded.split(ROWS)])[: len(x)] if len(x) else x.new_empty(0, len(weight))
