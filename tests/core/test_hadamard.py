"""The matrices are orthogonal, flat, and the ones that their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from quantkit.core.hadamard import Hadamard, in_words

EXACT = [1, 2, 64, 512, 12, 20, 28, 36, 44, 60, 104, 180, 192, 768, 896, 720]
"""Orders with a Hadamard matrix of Sylvester's and Paley's by a prime: 12 = 11 + 1, 28 = 2 (13 + 1), 104 = 103 + 1, 180 = 179 + 1."""
OTHERS = [3, 6, 86, 172, 92]


def matrix(size: int, seed: int = 0) -> torch.Tensor:
    return Hadamard(size, seed).turn(torch.eye(size))


@pytest.mark.parametrize("size", EXACT + OTHERS)
def test_a_matrix_is_orthogonal(size: int) -> None:
    turned = matrix(size).double()
    torch.testing.assert_close(turned @ turned.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", EXACT)
def test_all_entries_of_a_hadamard_matrix_have_one_size(size: int) -> None:
    torch.testing.assert_close(matrix(size).abs(), torch.full((size, size), size**-0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", OTHERS)
def test_where_there_is_none_no_entry_is_much_larger(size: int) -> None:
    assert float(matrix(size).abs().max()) <= (2 / size) ** 0.5 * 1.0001


@pytest.mark.parametrize("size", [2, 64, 256])
def test_powers_of_two_are_sylvesters_with_signed_rows(size: int) -> None:
    signs = Hadamard(size, seed=3).signs.numpy()
    expected = signs[:, None] * hadamard(size) / np.sqrt(size)
    np.testing.assert_allclose(matrix(size, seed=3).numpy(), expected, atol=1e-6)


def test_turning_back_undoes_turning_and_a_longer_row_turns_part_by_part() -> None:
    x = torch.randn(5, 3, 36, generator=torch.Generator().manual_seed(0))
    rotation = Hadamard(12)
    torch.testing.assert_close(rotation.turn_back(rotation.turn(x)), x)
    torch.testing.assert_close(rotation.turn(x)[..., 12:24], rotation.turn(x[..., 12:24].contiguous()))


def test_the_seed_alone_decides() -> None:
    assert torch.equal(matrix(64, 1), matrix(64, 1))
    assert not torch.equal(matrix(64, 1), matrix(64, 2))


def test_words_say_how_a_matrix_is_made() -> None:
    words = {256: "Hadamard 256", 12: "Hadamard 12", 768: "Hadamard 12 x Hadamard 64", 172: "Hartley 43 x Hadamard 4", 3: "Hartley 3"}
    assert {size: in_words(size) for size in words} == words
