"""Rounding that looks at the weight alone: nearest codes, searched scales, and scales that can always be stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.core.groups import as_groups
from quantkit.core.quantize import GridSearch, range_grid, rounding_noise, search_grid
from quantkit.core.scales import ScaleType, stored_scale
from quantkit.core.scheme import CHANNEL, WEIGHT_BITS, QuantSpec
from quantkit.errors import RecipeError
from quantkit.methods import ROUNDINGS, Statistics, get_rounding
from quantkit.methods.rtn import RoundToNearest, SearchedScales

SPECS = [QuantSpec(bits, group, symmetric) for bits in WEIGHT_BITS for group in (32, CHANNEL) for symmetric in (True, False)]
HALVES = [torch.float16, torch.bfloat16]


def named(spec: QuantSpec) -> str:
    return f"w{spec.bits}-g{spec.group}-{'sym' if spec.symmetric else 'asym'}"


def weights(rows: int = 17, columns: int = 96, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_every_weight_takes_its_nearest_code(spec: QuantSpec) -> None:
    weight = weights()

    q = RoundToNearest()(weight, spec, torch.float32, None)

    zero = torch.full_like(q.scale, spec.mid_code) if q.zero is None else q.zero.float()
    every = (torch.arange(spec.max_code + 1) - q.expand(zero)[..., None]) * q.expand(q.scale)[..., None]
    nearest = (every - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((q.dequantize() - weight).abs(), nearest, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_the_noise_of_rounding_is_foretold(spec: QuantSpec) -> None:
    weight = weights(200, 96)

    error = float((RoundToNearest()(weight, spec, torch.float32, None).dequantize() - weight).square().sum())

    assert error == pytest.approx(float(rounding_noise(weight, spec).sum()), rel=0.35 if spec.bits < 4 else 0.1)


def test_zeros_and_a_ragged_last_group_make_no_noise_of_their_own() -> None:
    weight, spec = weights(), QuantSpec(4, 64)

    assert rounding_noise(torch.zeros(3, 64), spec).tolist() == [0, 0, 0]
    torch.testing.assert_close(rounding_noise(weight, spec), rounding_noise(torch.nn.functional.pad(weight, (0, 32)), spec))


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_the_range_holds_every_weight_within_half_a_step(spec: QuantSpec) -> None:
    weight = weights()

    q = RoundToNearest()(weight, spec, torch.float32, None)

    # a symmetric grid reaches one step less on one side, and spans the largest weight by its middle
    assert bool(((q.dequantize() - weight).abs() <= q.expand(q.scale).abs() * (0.5 if not spec.symmetric else 0.5001) + 1e-6).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_searched_scales_are_never_worse_than_the_range(spec: QuantSpec, is_weighted: bool, dtype: torch.dtype) -> None:
    groups = as_groups(weights(), spec)
    importance = torch.rand(1, *groups.shape[1:], generator=torch.Generator().manual_seed(5)) if is_weighted else torch.ones(1, 1, 1)

    def loss(grid) -> Tensor:
        return (importance * (grid.values(grid.nearest(groups, spec)) - groups) ** 2).sum(-1)

    searched = loss(search_grid(groups, spec, ScaleType(dtype), importance if is_weighted else None))

    assert bool((searched <= loss(range_grid(groups, spec, ScaleType(dtype)))).all())
    assert searched.sum() < loss(range_grid(groups, spec, ScaleType(dtype))).sum() or spec.bits == 8


def test_a_search_in_chunks_is_the_search_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, groups = QuantSpec(4, 32), as_groups(weights(rows=40), QuantSpec(4, 32))
    whole = search_grid(groups, spec, ScaleType(torch.float16))

    monkeypatch.setattr("quantkit.core.quantize._CHUNK", 300)

    assert torch.equal(search_grid(groups, spec, ScaleType(torch.float16)).scale, whole.scale)


def test_importance_moves_error_to_where_it_does_not_matter() -> None:
    spec, weight = QuantSpec(3, 32), weights()
    diagonal = torch.where(torch.arange(96) % 8 == 0, 1000.0, 0.01)

    plain = SearchedScales()(weight, spec, torch.float16, None)
    weighted = SearchedScales()(weight, spec, torch.float16, Statistics(torch.diag(diagonal), 100))

    def important(q) -> Tensor:
        return ((q.dequantize() - weight)[:, ::8] ** 2).sum()

    assert important(weighted) < 0.5 * important(plain)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1e-8, 1e-4, 1.0, 6e4, 1e6, 1e30, 3e38])
def test_stored_scales_are_never_zero_nor_infinite_and_keep_their_sign(value: float, dtype: torch.dtype) -> None:
    scale = stored_scale(torch.tensor([value, -value]), dtype)

    assert bool((torch.isfinite(scale) & (scale != 0)).all())
    assert torch.equal(scale, scale.to(dtype).float())
    assert scale[0] > 0 and (value == 0 or scale[1] < 0)


@pytest.mark.parametrize("rounding", [RoundToNearest(), SearchedScales()], ids=["rtn", "mse"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-3, 3e4], ids=str)
def test_constant_and_empty_groups_round_without_fault(value: float, symmetric: bool, dtype: torch.dtype, rounding) -> None:
    weight = torch.full((4, 64), value)
    weight[1] = 0
    weight[2] = -value

    q = rounding(weight, QuantSpec(4, 32, symmetric), dtype, None)

    assert bool((torch.isfinite(q.scale) & (q.scale != 0)).all())
    torch.testing.assert_close(q.dequantize(), weight, rtol=0.08, atol=1e-4)


def test_a_widened_search_finds_an_outlier_s_group_worth_clipping() -> None:
    weight = weights(rows=4, columns=32)
    weight[:, 0] = 0.5

    few = search_grid(weight[:, None], QuantSpec(4, 32), ScaleType(torch.float16), search=GridSearch(steps=2, low=1.0, high=1.0, refits=0))
    many = search_grid(weight[:, None], QuantSpec(4, 32), ScaleType(torch.float16))

    assert bool((many.scale.abs() <= few.scale.abs() * 1.1 + 1e-6).all())


@pytest.mark.parametrize("name", ROUNDINGS)
def test_every_rounding_gives_the_same_bits_again(name: str) -> None:
    seen = Statistics(torch.eye(96), 100)

    first, second = (get_rounding(name)(weights(), QuantSpec(4, 32), torch.float16, seen) for _ in range(2))

    assert first.equals(second)


def test_unknown_roundings_and_settings_are_answered_with_near_ones() -> None:
    with pytest.raises(RecipeError, match="unknown rounding 'gtpq'; did you mean 'gptq'"):
        get_rounding("gtpq")
    with pytest.raises(RecipeError, match="no setting 'dmap'; did you mean 'damp'"):
        get_rounding("gptq", {"dmap": 0.1})
    with pytest.raises(RecipeError, match="'rtn' has no setting 'damp'; it has no settings"):
        get_rounding("rtn", {"damp": 0.1})
