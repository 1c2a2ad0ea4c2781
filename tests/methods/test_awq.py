"""Activation-aware scales: the error that is searched is the outputs', and no scale is worse than none."""

from __future__ import annotations

import pytest
import torch

from quantkit.core.scheme import QuantSpec
from quantkit.errors import RecipeError
from quantkit.methods.awq import AWQ, error, expected_error
from quantkit.methods.base import Reader, Rounding, Statistics
from quantkit.methods.clip import ClippedToNearest
from quantkit.methods.rtn import RoundToNearest, SearchedScales

INPUTS = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 64)
SPEC = QuantSpec(bits=3, group=32, symmetric=False)


def statistics() -> Statistics:
    return Statistics(INPUTS.T @ INPUTS / len(INPUTS), len(INPUTS), INPUTS.abs().mean(0), INPUTS.abs().amax(0))


def reader(rows: int = 48, spec: QuantSpec = SPEC, rounding: Rounding | None = None) -> Reader:
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    return Reader(weight, statistics(), spec, rounding or RoundToNearest(), torch.float32)


def output_error(one: Reader, scale: torch.Tensor) -> float:
    """From the inputs themselves."""
    rounded = one.rounding(one.weight * scale, one.spec, one.scale_dtype, one.statistics.divided(scale)).dequantize()
    return float((INPUTS / scale @ rounded.T - INPUTS @ one.weight.T).square().sum())


def test_the_error_is_that_of_the_outputs() -> None:
    one, scale = reader(), torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.5

    assert error([one], scale) == pytest.approx(output_error(one, scale), rel=1e-3)
    assert error([one, reader(16)], scale) == pytest.approx(output_error(one, scale) + output_error(reader(16), scale), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_expected_error_is_near_the_true_one(symmetric: bool) -> None:
    one = reader(2000, QuantSpec(bits=6, group=32, symmetric=symmetric))

    expected = float(expected_error([one], torch.ones(64))) / 63**2 / 12

    assert expected == pytest.approx(error([one], torch.ones(64)), rel=0.15)


def test_the_scale_lowers_the_error_and_polishing_lowers_it_further() -> None:
    one, index = reader(), torch.arange(64)
    scales = torch.ones(64), AWQ(polish=0).scale([one], index, 64), AWQ().scale([one], index, 64)
    none, searched, polished = (error([one], scale) for scale in scales)

    assert polished < searched < 0.9 * none


@pytest.mark.parametrize("rounding", [ClippedToNearest(), SearchedScales()], ids=["clipped", "searched"])
def test_the_few_scales_that_are_judged_lose_no_more_than_all_would(rounding: Rounding) -> None:
    one, index = reader(rounding=rounding), torch.arange(64)
    awq = AWQ(polish=0)
    least = min(error([one], scale) for scale in awq._candidates([one], index, 64))

    assert error([one], awq.scale([one], index, 64)) <= 1.02 * least


def test_channels_that_share_a_scale_are_given_one() -> None:
    index = torch.arange(32).repeat(2)

    scale = AWQ().scale([reader()], index, 32)

    assert scale.shape == (32,) and bool((scale > 0).all())
    assert error([reader()], scale[index]) < error([reader()], torch.ones(64))


def test_where_no_scale_helps_there_is_none() -> None:
    one = Reader(torch.ones(4, 64), statistics(), SPEC, RoundToNearest(), torch.float32)

    assert torch.equal(AWQ(grid=2).scale([one], torch.arange(64), 64), torch.ones(64))


def test_inputs_that_are_never_on_give_finite_scales() -> None:
    seen = statistics()
    dead = Statistics(torch.zeros_like(seen.hessian), 400, torch.zeros(64), torch.zeros(64))
    one = Reader(torch.randn(8, 64), dead, SPEC, RoundToNearest(), torch.float32)

    assert bool(torch.isfinite(AWQ().scale([one], torch.arange(64), 64)).all())


def test_dividing_inputs_divides_what_was_seen() -> None:
    scale = torch.rand(64) + 0.5
    seen, x = statistics().divided(scale), INPUTS / scale

    torch.testing.assert_close(seen.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((seen.mean_size, seen.largest), (x.abs().mean(0), x.abs().amax(0)))


def test_clipping_lowers_the_error_of_outputs_and_of_no_group_raises_it() -> None:
    one = reader()
    blocks = [one.statistics.hessian[at : at + 32, at : at + 32] for at in (0, 32)]

    def errors(rounding: RoundToNearest | ClippedToNearest) -> torch.Tensor:
        difference = rounding(one.weight, SPEC, torch.float32, one.statistics).dequantize() - one.weight
        return torch.stack([((part @ block) * part).sum(1) for part, block in zip(difference.split(32, dim=1), blocks, strict=True)])

    plain, clipped = errors(RoundToNearest()), errors(ClippedToNearest())

    assert bool((clipped <= plain * 1.0001 + 1e-6).all()) and float(clipped.sum()) < 0.9 * float(plain.sum())


def test_weights_beyond_a_clipped_range_take_its_end() -> None:
    weight = torch.linspace(-1, 1, 32).repeat(2, 1)
    weight[:, -1] = 8.0  # an input that is hardly ever on
    seen = Statistics(torch.diag(torch.cat([torch.ones(31), torch.tensor([1e-6])])), 400)

    clipped, plain = (rounding(weight, SPEC, torch.float32, seen) for rounding in (ClippedToNearest(smallest=0.1), RoundToNearest()))

    assert (clipped.codes[:, -1] == SPEC.max_code).all() and (clipped.dequantize()[:, -1] < 2).all()
    others = [(q.dequantize() - weight)[:, :-1].square().mean() for q in (clipped, plain)]
    assert others[0] < 0.1 * others[1]


def test_clipping_without_statistics_is_rounding_to_nearest() -> None:
    one = reader()

    clipped, plain = (rounding(one.weight, SPEC, torch.float32, None) for rounding in (ClippedToNearest(), RoundToNearest()))

    assert clipped.equals(plain)


def test_a_rounding_that_searches_scales_is_not_clipped() -> None:
    searched, nearest = SearchedScales(), RoundToNearest()

    assert AWQ().rounding(searched) is searched and isinstance(AWQ().rounding(nearest), ClippedToNearest)
    assert AWQ(clip=False).rounding(nearest) is nearest


def test_blocks_that_span_rows_are_scaled_too_and_not_clipped() -> None:
    one = reader(spec=QuantSpec(bits=8, group=(16, 16), kind="e4m3"))

    scale = AWQ(rows=8).scale([one], torch.arange(64), 64)

    assert error([one], scale) <= error([one], torch.ones(64))
    clipped, plain = (rounding(one.weight, one.spec, torch.float32, one.statistics) for rounding in (ClippedToNearest(), RoundToNearest()))
    assert clipped.equals(plain)


@pytest.mark.parametrize("settings", [{"grid": 0}, {"grid": 1.5}, {"polish": -1}, {"duo": "both"}, {"clip": 1}, {"rows": 0}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(settings))):
        AWQ(**settings)
