"""Weights to integer codes and back on a grid of scales and zero points, and the search for the grid that loses least.

A grid is a scale [..., 1] and a zero point [..., 1] per group [..., g], in the units of unsigned codes: value = (code - zero) * scale. Scales may
be negative in a symmetric grid: its codes reach one step further on one side (-8 to 7 at 4 bits), and the sign turns that side to where the
largest weight lies, as llama.cpp's Q4_0 does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.core.scheme import ActivationSpec, QuantSpec

_CHUNK = 1 << 20
"""Values searched at once: temporaries stay near the size of a processor's cache."""


@dataclass(frozen=True, slots=True)
class GridSearch:
    """How far and how finely the search goes below and above the range that just holds every weight."""

    steps: int = 24
    low: float = 0.55
    high: float = 1.10
    refits: int = 2


@dataclass(frozen=True, slots=True)
class Grid:
    """Scale and zero point of groups [..., g]; both [..., 1] in float32. `zero` is constant in a symmetric grid."""

    scale: Tensor
    zero: Tensor

    def codes(self, values: Tensor, max_code: int) -> Tensor:
        """The nearest codes, as floats."""
        return torch.clamp(torch.round(values / self.scale + self.zero), 0, max_code)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero) * self.scale


def as_groups(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[N, K] as [N, G, g]; K is a multiple of the group size."""
    rows, columns = weight.shape
    return weight.reshape(rows, spec.num_groups(columns), spec.group_size(columns))


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be stored, back in float32: rounded to its type, never zero, never infinite.

    Half precision goes down into its subnormals, which small weights at 8 bits need.
    """
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps if dtype == torch.float16 else info.tiny
    magnitude = scale.abs().clamp(smallest, info.max)
    return torch.where(scale < 0, -magnitude, magnitude).to(dtype).float()


def range_grid(groups: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Grid:
    """The grid that spans the smallest to the largest value of each group, zero included, with no search (round-to-nearest)."""
    if spec.symmetric:
        scale = groups.abs().amax(-1, keepdim=True) * (2 / spec.max_code)
        return _symmetric(scale, spec, dtype)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    return _asymmetric(low, high, spec, dtype)


def rounding_noise(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The squared error [N] that rounding [N, K] to nearest is expected to make: step² / 12 a value, and nothing for zeros, which are kept."""
    rest = -weight.shape[1] % spec.group_size(weight.shape[1])
    groups = as_groups(torch.nn.functional.pad(weight, (0, rest)), spec)
    return (range_grid(groups, spec, torch.float32).scale.square() / 12 * (groups != 0)).sum((1, 2))


def search_grid(groups: Tensor, spec: QuantSpec, dtype: torch.dtype, importance: Tensor | None = None, search: GridSearch | None = None) -> Grid:
    """The grid of least weighted squared error among shrunken and widened ranges, refitted by least squares.

    Args:
        groups: float32 [N, G, g].
        importance: weight of each squared error, broadcast to groups; None for all alike.
        search: how fine; the default is the recommended choice.
    """
    search = search or GridSearch()
    if spec.symmetric:
        search = _widened(search, spec)
    weights = torch.ones_like(groups[:1]) if importance is None else importance
    parts = []
    rows_at_once = max(1, _CHUNK // max(1, groups[0].numel()))
    for start in range(0, groups.shape[0], rows_at_once):
        chunk = groups[start : start + rows_at_once]
        rows = weights if weights.shape[0] == 1 else weights[start : start + rows_at_once]
        parts.append(_search_chunk(chunk, spec, dtype, rows, search))
    return Grid(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def _search_chunk(groups: Tensor, spec: QuantSpec, dtype: torch.dtype, weights: Tensor, search: GridSearch) -> Grid:
    best = range_grid(groups, spec, dtype)
    least = _error(groups, best, spec, weights)
    for factor in torch.linspace(search.low, search.high, search.steps).tolist():
        for candidate in _candidates(groups, spec, dtype, factor):
            best, least = _better(groups, spec, weights, best, least, candidate)
    for _ in range(search.refits):
        best, least = _better(groups, spec, weights, best, least, _refit(groups, best, spec, dtype, weights))
    return best


def _widened(search: GridSearch, spec: QuantSpec) -> GridSearch:
    """At few bits the best symmetric range of a bell-shaped group is much narrower or, on one side, wider than its largest value."""
    if spec.bits >= 4:
        return search
    return GridSearch(steps=search.steps + 8, low=0.35 if spec.bits == 2 else 0.45, high=1.6 if spec.bits == 2 else 1.2, refits=search.refits + 1)


def _candidates(groups: Tensor, spec: QuantSpec, dtype: torch.dtype, factor: float) -> list[Grid]:
    if spec.symmetric:
        scale = groups.abs().amax(-1, keepdim=True) * (2 * factor / spec.max_code)
        return [_symmetric(scale, spec, dtype), _symmetric(-scale, spec, dtype)]
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    return [_asymmetric(low * factor, high * factor, spec, dtype)]


def _refit(groups: Tensor, grid: Grid, spec: QuantSpec, dtype: torch.dtype, weights: Tensor) -> Grid:
    """The least-squares scale for the codes that the grid gives, with the same zero points."""
    steps = grid.codes(groups, spec.max_code) - grid.zero
    power = (weights * steps * steps).sum(-1, keepdim=True)
    scale = torch.where(power > 0, (weights * steps * groups).sum(-1, keepdim=True) / power.clamp(min=1e-30), grid.scale)
    scale = torch.where(scale == 0, grid.scale, scale)
    return Grid(stored_scale(scale, dtype), grid.zero)


def _better(groups: Tensor, spec: QuantSpec, weights: Tensor, best: Grid, least: Tensor, candidate: Grid) -> tuple[Grid, Tensor]:
    error = _error(groups, candidate, spec, weights)
    wins = error < least
    return Grid(torch.where(wins, candidate.scale, best.scale), torch.where(wins, candidate.zero, best.zero)), torch.where(wins, error, least)


def _error(groups: Tensor, grid: Grid, spec: QuantSpec, weights: Tensor) -> Tensor:
    difference = grid.values(grid.codes(groups, spec.max_code)) - groups
    return (weights * difference * difference).sum(-1, keepdim=True)


def _symmetric(scale: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Grid:
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return Grid(stored_scale(scale, dtype), torch.full_like(scale, spec.mid_code))


def _asymmetric(low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Grid:
    scale = (high - low) / spec.max_code
    scale = stored_scale(torch.where(scale == 0, torch.ones_like(scale), scale), dtype)
    return Grid(scale, torch.clamp(torch.round(-low / scale), 0, spec.max_code))


def quantize_activations(x: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    """Integer codes of activations [..., K], as whole numbers in x's type, and their scales [..., 1].

    One dynamic symmetric scale a token, after compressed-tensors: scale = largest magnitude / 127.5, codes from -128 to 127.
    """
    levels = 1 << spec.bits
    scale = x.abs().amax(-1, keepdim=True) / ((levels - 1) / 2)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return torch.clamp(torch.round(x / scale), -levels // 2, levels // 2 - 1), scale


def fake_quantize(x: Tensor, spec: ActivationSpec) -> Tensor:
    """The values of activations [..., K] that their integer codes stand for, in x's type."""
    codes, scale = quantize_activations(x, spec)
    return codes * scale
