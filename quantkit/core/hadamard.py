"""Orthogonal matrices that spread every channel evenly over all others, applied without being written out.

A randomised Hadamard matrix diag(s) H / sqrt(n) (QuaRot, Ashkboos et al. 2024) makes outliers of single channels vanish in all. Sylvester's doubling
gives powers of two; Paley's constructions the orders 12, 20, 28, 36, ... that other widths have as a factor. Where they have none, the odd part is a
discrete Hartley transform, whose entries are at most sqrt(2) times as large: it mixes all channels, as blocks of a power of two would not, and
follows from a formula, as a random matrix would not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import isqrt, sqrt

import torch
from torch import Tensor

_LARGEST_FACTOR = 64
_AT_ONCE = 1 << 21
"""Numbers that are turned at once, so that a matrix needs little beside itself and what it becomes."""


@dataclass(frozen=True)
class Hadamard:
    """An orthogonal matrix R [size, size]; the same size and seed are the same matrix.

    Attributes:
        seed: of the signs of its rows.
    """

    size: int
    seed: int = 0
    signs: Tensor = field(init=False, repr=False, compare=False)
    """Float32 [size], 1 or -1."""

    def __post_init__(self) -> None:
        drawn = torch.randint(0, 2, (self.size,), generator=torch.Generator().manual_seed(self.seed))
        object.__setattr__(self, "signs", (2 * drawn - 1).float())

    def turn(self, x: Tensor) -> Tensor:
        """x R over the last dimension, in float32; where that is a multiple of the size, every part of it by itself."""
        flat = x.reshape(-1, x.shape[-1])
        turned = torch.empty(flat.shape, device=x.device)
        step = max(1, _AT_ONCE // x.shape[-1])
        for start in range(0, len(flat), step):
            turned[start : start + step] = self._turned(flat[start : start + step].float())
        return turned.view(x.shape)

    def turn_back(self, x: Tensor) -> Tensor:
        """x R^T over the last dimension, as `turn`."""
        parts = x.float().reshape(-1, self.size)
        return (_multiplied(parts, [factor.T for factor in _factors(self.size)]) * self.signs.to(x.device)).view(x.shape)

    def _turned(self, x: Tensor) -> Tensor:
        return _multiplied(x.reshape(-1, self.size) * self.signs.to(x.device), _factors(self.size)).view(x.shape)


def in_words(size: int) -> str:
    """How the matrix of this size is made, as "Hadamard 12 x 64"."""
    odd, rest = _split(size)
    if odd == 1:
        return f"Hadamard {size}"
    return f"{'Hadamard' if _is_hadamard(odd) else 'Hartley'} {odd}" + (f" x Hadamard {rest}" if rest > 1 else "")


def _multiplied(x: Tensor, factors: list[Tensor]) -> Tensor:
    """x [n, size] times the Kronecker product of the factors."""
    n, size = x.shape
    for factor in factors:  # the first axis of what remains goes to the end, so that each is a plain product, and all are where they were at last
        x = x.reshape(n, len(factor), -1).transpose(1, 2).reshape(-1, len(factor)) @ factor.to(x.device)
    return x.reshape(n, size)


@lru_cache
def _factors(size: int) -> list[Tensor]:
    """Orthogonal matrices, float32, whose Kronecker product is the whole."""
    first, rest = _split(size)
    factors = [] if first == 1 else [_paley(first) / sqrt(first) if _is_hadamard(first) else _hartley(first)]
    while rest > 1:
        part = min(rest, _LARGEST_FACTOR)
        factors.append(_sylvester(part) / sqrt(part))
        rest //= part
    return [factor.float() for factor in factors] or [torch.ones(1, 1)]


def _split(size: int) -> tuple[int, int]:
    """The smallest order of Paley's that leaves a power of two, else the odd part, and that power."""
    rest = size & -size
    odd = size // rest
    if odd == 1:
        return 1, size
    orders = (odd << shift for shift in range(2, rest.bit_length()))
    order = next((order for order in orders if _is_hadamard(order)), odd)
    return order, size // order


def _is_hadamard(order: int) -> bool:
    """Whether Paley has a matrix of this order by a prime."""
    return order % 4 == 0 and (_is_prime(order - 1) or (_is_prime(order // 2 - 1) and order // 2 % 4 == 2))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _sylvester(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def _paley(order: int) -> Tensor:
    """Paley 1933: of q + 1 for a prime q = 3 mod 4, of 2 (q + 1) for a prime q = 1 mod 4. Entries 1 and -1."""
    is_first = _is_prime(order - 1)
    q = order - 1 if is_first else order // 2 - 1
    squares = torch.zeros(q, dtype=torch.bool)
    squares[torch.arange(1, q) ** 2 % q] = True
    character = torch.where(squares, 1.0, -1.0).double()
    character[0] = 0
    difference = (torch.arange(q)[:, None] - torch.arange(q)[None]) % q
    core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, -1 if is_first else 1, character[difference]
    identity = torch.eye(q + 1, dtype=torch.float64)
    if is_first:
        return identity + core
    ones, signs = ([[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]])
    return torch.kron(core, torch.tensor(ones, dtype=torch.float64)) + torch.kron(identity, torch.tensor(signs, dtype=torch.float64))


def _hartley(size: int) -> Tensor:
    """(cos + sin)(2 pi j k / n) / sqrt(n): real, symmetric, orthogonal."""
    turns = torch.arange(size)[:, None] * torch.arange(size)[None] % size
    angle = turns.double() * (2 * torch.pi / size)
    return (angle.cos() + angle.sin()) / sqrt(size)
