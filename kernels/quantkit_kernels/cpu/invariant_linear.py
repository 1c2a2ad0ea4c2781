"""Products whose rows do not depend on how many rows there are: BLAS sums in another order for another number of rows, so it is always given 16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 16


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[M, K] by [N, K], both float32, in tiles of 16 rows."""
    return torch.cat([functional.linear(tile, weight) for tile in _tiles(x)])[: len(x)] if len(x) else x.new_empty(0, len(weight))


def in_tiles(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of rows [..., M, K], given 16 of them at a time; what it returns has a row for each.

    Args:
        function: what else it takes must not depend on the rows; it returns a tensor or a tuple of tensors.
    """

    def tiled(x: Tensor, *others: Any, **named: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        found = [function(tile.view(*(1,) * (x.dim() - 2), *tile.shape), *others, **named) for tile in _tiles(rows)]
        if isinstance(found[0], Tensor):
            return _rejoined(found, len(rows), x)
        return tuple(_rejoined(parts, len(rows), x) for parts in zip(*found, strict=True))

    return tiled


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    return functional.pad(x, (0, 0, 0, -len(x) % ROWS)).split(ROWS)


def _rejoined(tiles: tuple[Tensor, ...] | list[Tensor], count: int, x: Tensor) -> Tensor:
    """[count, N], or with x's leading dimensions where the tiles have them."""
    whole = torch.cat([tile.reshape(-1, tile.shape[-1]) for tile in tiles])[:count]
    return whole.view(*x.shape[:-1], -1) if tiles[0].dim() == x.dim() else whole
