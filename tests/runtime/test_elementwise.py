"""A value's result does not depend on its place, and is torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from quantkit.runtime.elementwise import EvenElementwise

FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    functional.silu, functional.gelu, torch.sigmoid, torch.tanh, functional.softplus, torch.exp, lambda x: x.cos(), lambda x: x.sigmoid(),
    lambda x: functional.gelu(x, approximate="tanh"),
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (5, 172), (40, 1025), (3, 5, 7)])
def test_every_place_gives_the_same_bits(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3

    with EvenElementwise():
        whole = function(x)
        rows = torch.stack([function(row) for row in x])
        moved = function(x.flip(0)).flip(0)

    assert torch.equal(whole, rows) and torch.equal(whole, moved)
    torch.testing.assert_close(whole, function(x), rtol=1e-6, atol=1e-7)


def test_what_has_two_tensors_is_left_as_it_is() -> None:
    x, y = torch.rand(7), torch.rand(7)

    with EvenElementwise():
        assert torch.equal(torch.pow(x, y), x**y)
        torch.testing.assert_close(functional.silu(x.clone(), inplace=True), functional.silu(x))
