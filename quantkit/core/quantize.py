"""Weights to levels on a grid of scales and zero points, and the search for the grid that loses least.

A grid is a scale [..., 1] and a zero point [..., 1] per group [..., g]: value = level * scale, where the level of an integer is code - zero. Scales
may be negative in a symmetric grid of integers: its codes reach one step further on one side (-8 to 7 at 4 bits), and the sign turns that side to
where the largest weight lies, as llama.cpp's Q4_0 does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.core.groups import as_groups, from_groups
from quantkit.core.levels import code_of, nearest_level, top_level
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scales import NestedScales, ScaleType, nest
from quantkit.core.scheme import QuantSpec

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
    """Scale and zero point of groups [..., g]; both [..., 1] in float32. `zero` is constant in a symmetric grid, and nothing to floats.

    Attributes:
        nested: the codes of the scales and what they stand for, where the scales have been through double quantization.
    """

    scale: Tensor
    zero: Tensor
    nested: tuple[Tensor, NestedScales] | None = None

    def nearest(self, values: Tensor, spec: QuantSpec) -> Tensor:
        """The nearest levels. bitsandbytes multiplies by the inverse of a scale where others divide."""
        return nearest_level(values * (1.0 / self.scale) if spec.is_flat else values / self.scale, spec, self.zero)

    def values(self, levels: Tensor) -> Tensor:
        return levels * self.scale

    def where(self, wins: Tensor, other: Grid) -> Grid:
        """This grid for the groups that win, bool [..., 1], and the other for the rest."""
        return Grid(torch.where(wins, self.scale, other.scale), torch.where(wins, self.zero, other.zero))

    def doubly_quantized(self) -> Grid:
        """The same grid with the scales that double quantization leaves."""
        codes, nested = nest(self.scale.flatten())
        return Grid(nested.scales(codes).view_as(self.scale), self.zero, (codes, nested))


def range_grid(groups: Tensor, spec: QuantSpec, scales: ScaleType) -> Grid:
    """The grid that spans the smallest to the largest value of each group, zero included, with no search (round-to-nearest)."""
    if spec.symmetric:
        largest, top = groups.abs().amax(-1, keepdim=True), top_level(spec)
        if spec.scale == "e8m0":
            return _symmetric(_power_below(largest, top), spec, scales)
        return _symmetric(largest * (1 / top) if spec.kind == "int" else largest / top, spec, scales)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    return _asymmetric(low, high, spec, scales)


def _power_below(largest: Tensor, top: float) -> Tensor:
    """The power of two that MX gives a block: the largest value's own over the largest level's, so that the block may end a little short."""
    return torch.exp2(torch.floor(torch.log2(largest.clamp(min=2.0**-126))) - torch.floor(torch.log2(torch.tensor(top))))


def rounding_noise(weight: Tensor, spec: QuantSpec) -> Tensor:
    """The squared error [N] that rounding [N, K] to nearest is expected to make: step² / 12 an integer, and nothing for zeros, which are kept.

    Floats have steps of many sizes, so for them the error is taken that rounding does make. Ragged groups and blocks are filled up with zeros.
    """
    rows, columns = weight.shape
    high, wide = spec.group if isinstance(spec.group, tuple) else (1, 1 if spec.is_flat else spec.group_size(columns))
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
    groups = as_groups(padded, spec)
    grid = range_grid(groups, spec, ScaleType.of(spec, torch.float32, weight))
    is_int = spec.kind == "int"
    error = grid.scale.square() / 12 * (groups != 0) if is_int else (grid.values(grid.nearest(groups, spec)) - groups).square()
    return from_groups(error, spec, tuple(padded.shape)).sum(1)[:rows]


def search_grid(groups: Tensor, spec: QuantSpec, scales: ScaleType, importance: Tensor | None = None, search: GridSearch | None = None) -> Grid:
    """The grid of least weighted squared error among shrunken and widened ranges, refitted by least squares.

    8-bit floats lose alike at every scale, so theirs is not searched.

    Args:
        groups: float32 [N, G, g].
        importance: weight of each squared error, broadcast to groups; None for all alike.
        search: how fine; the default is the recommended choice.
    """
    if spec.kind == "e4m3":
        return range_grid(groups, spec, scales)
    search = search or GridSearch()
    if spec.symmetric:
        search = _widened(search, spec)
    weights = torch.ones_like(groups[:1]) if importance is None else importance
    parts = []
    rows_at_once = max(1, _CHUNK // max(1, groups[0].numel()))
    for start in range(0, groups.shape[0], rows_at_once):
        chunk = groups[start : start + rows_at_once]
        rows = weights if weights.shape[0] == 1 else weights[start : start + rows_at_once]
        parts.append(_search_chunk(chunk, spec, scales, rows, search))
    return Grid(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def _search_chunk(groups: Tensor, spec: QuantSpec, scales: ScaleType, weights: Tensor, search: GridSearch) -> Grid:
    best = range_grid(groups, spec, scales)
    least = _error(groups, best, spec, weights)
    for factor in torch.linspace(search.low, search.high, search.steps).tolist():
        for candidate in _candidates(groups, spec, scales, factor):
            best, least = _better(groups, spec, weights, best, least, candidate)
    for _ in range(search.refits):
        best, least = _better(groups, spec, weights, best, least, _refit(groups, best, spec, scales, weights))
    return best


def _widened(search: GridSearch, spec: QuantSpec) -> GridSearch:
    """At few bits the best symmetric range of a bell-shaped group is much narrower or, on one side, wider than its largest value."""
    if spec.scale == "e8m0":
        return replace(search, low=0.45, high=1.6)
    if spec.bits >= 4:
        return search
    return GridSearch(steps=search.steps + 8, low=0.35 if spec.bits == 2 else 0.45, high=1.6 if spec.bits == 2 else 1.2, refits=search.refits + 1)


def _candidates(groups: Tensor, spec: QuantSpec, scales: ScaleType, factor: float) -> list[Grid]:
    if spec.symmetric:
        scale = groups.abs().amax(-1, keepdim=True) * (factor / top_level(spec))
        return [_symmetric(sign * scale, spec, scales) for sign in ((1, -1) if spec.kind == "int" and spec.scale == "float" else (1,))]
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    return [_asymmetric(low * factor, high * factor, spec, scales)]


def _refit(groups: Tensor, grid: Grid, spec: QuantSpec, scales: ScaleType, weights: Tensor) -> Grid:
    """The least-squares scale for the codes that the grid gives, with the same zero points."""
    steps = grid.nearest(groups, spec)
    power = (weights * steps * steps).sum(-1, keepdim=True)
    scale = torch.where(power > 0, (weights * steps * groups).sum(-1, keepdim=True) / power.clamp(min=1e-30), grid.scale)
    scale = torch.where(scale == 0, grid.scale, scale)
    return Grid(scales.stored(scale), grid.zero)


def _better(groups: Tensor, spec: QuantSpec, weights: Tensor, best: Grid, least: Tensor, candidate: Grid) -> tuple[Grid, Tensor]:
    error = _error(groups, candidate, spec, weights)
    wins = error < least
    return candidate.where(wins, best), torch.where(wins, error, least)


def _error(groups: Tensor, grid: Grid, spec: QuantSpec, weights: Tensor) -> Tensor:
    difference = grid.values(grid.nearest(groups, spec)) - groups
    return (weights * difference * difference).sum(-1, keepdim=True)


def _symmetric(scale: Tensor, spec: QuantSpec, scales: ScaleType) -> Grid:
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return Grid(scales.stored(scale), torch.full_like(scale, spec.mid_code))


def _asymmetric(low: Tensor, high: Tensor, spec: QuantSpec, scales: ScaleType) -> Grid:
    scale = (high - low) / spec.max_code
    scale = scales.stored(torch.where(scale == 0, torch.ones_like(scale), scale))
    return Grid(scale, torch.clamp(torch.round(-low / scale), 0, spec.max_code))


def from_grid(spec: QuantSpec, levels: Tensor, grid: Grid, scales: ScaleType) -> QuantizedTensor:
    """A quantized tensor of levels [N, K] and the grid [R, G, 1] they are on, both float32; what was stored of scales is stored."""
    shape = spec.scale_shape(*levels.shape)
    zero = None if spec.symmetric else grid.zero.reshape(shape).to(torch.int16)
    at = spec.mid_code if spec.symmetric else _zero_of_each(grid, spec, levels)
    codes = code_of(levels, spec, at)
    if spec.scale == "nested":
        scale, nested = grid.nested or nest(grid.scale.flatten())
        return QuantizedTensor(spec, codes, scale, nested=nested)
    divisor = torch.tensor([scales.divisor], dtype=torch.float32, device=levels.device) if spec.scale == "e4m3" else None
    return QuantizedTensor(spec, codes, scales.write(grid.scale.reshape(shape)), zero, divisor=divisor)


def _zero_of_each(grid: Grid, spec: QuantSpec, levels: Tensor) -> Tensor:
    groups = levels.shape[0], grid.zero.shape[1], spec.group_size(levels.shape[1])
    return grid.zero.expand(groups).reshape(levels.shape)


def rounded(weight: Tensor, spec: QuantSpec, scale_dtype: torch.dtype, *, search: bool, importance: Tensor | None = None) -> QuantizedTensor:
    """Every weight of float32 [N, K] at its nearest level, on the grid that spans each group or on the one that loses least.

    Args:
        importance: float32 [K], what a squared error of each column weighs in the search.
    """
    if spec.scale == "row maximum" and not search:
        return _by_row_maximum(weight, spec)
    scales, groups = ScaleType.of(spec, scale_dtype, weight), as_groups(weight, spec)
    grid = range_grid(groups, spec, scales) if not search else search_grid(groups, spec, scales, column_weights(importance, spec, weight.shape))
    if search and spec.scale == "nested":
        grid = grid.doubly_quantized()  # round to the scales that will be there; bitsandbytes, which searches nothing, does not
    return nearest_on(weight, spec, grid, scales)


def nearest_on(weight: Tensor, spec: QuantSpec, grid: Grid, scales: ScaleType) -> QuantizedTensor:
    """Every weight of float32 [N, K] at its nearest level on a grid [R, G, 1]."""
    return from_grid(spec, from_groups(grid.nearest(as_groups(weight, spec), spec), spec, weight.shape), grid, scales)


def _by_row_maximum(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """As bitsandbytes computes it, to the bit: the step is never divided out of the maximum, so that a round trip cannot move it."""
    largest = weight.abs().amax(1, keepdim=True)
    largest = torch.where(largest == 0, torch.ones_like(largest), largest)
    return QuantizedTensor(spec, code_of(torch.round(weight * (top_level(spec) / largest)), spec, spec.mid_code), largest)


def column_weights(importance: Tensor | None, spec: QuantSpec, shape: tuple[int, int]) -> Tensor | None:
    """Weights [K] of columns in the shape of groups: [1, G, g] where every row has the same, else [R, G, g]."""
    if importance is None:
        return None
    return as_groups(importance.expand(shape) if spec.spans_rows else importance[None], spec)
