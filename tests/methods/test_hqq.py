"""Half-quadratic quantization lowers the error it is judged by and never raises the one it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.core.groups import as_groups
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import WEIGHT_BITS, QuantSpec
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import RecipeError
from quantkit.methods.hqq import HalfQuadratic, soft_threshold
from quantkit.methods.rtn import RoundToNearest

SPECS = [QuantSpec(bits, 64, symmetric) for bits in WEIGHT_BITS for symmetric in (True, False)]


def weights(rows: int = 24, columns: int = 256) -> Tensor:
    torch.manual_seed(0)
    return torch.distributions.StudentT(3.0).sample((rows, columns)) * 0.02


def lost(q: QuantizedTensor, weight: Tensor, p: float) -> Tensor:
    """The sum of |error|^p in every group."""
    return as_groups((q.dequantize() - weight).double().abs().pow(p), q.spec).sum(-1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"w{s.bits}-{'sym' if s.symmetric else 'asym'}")
def test_no_group_loses_more_than_on_its_range_in_squares_or_in_the_norm(spec: QuantSpec) -> None:
    weight = weights()
    found, nearest = (method(weight, spec, torch.float16, None) for method in (HalfQuadratic(), RoundToNearest()))

    for p in (0.7, 2.0):
        assert bool((lost(found, weight, p) <= lost(nearest, weight, p) * (1 + 1e-5)).all())
    assert lost(found, weight, 2.0).sum() < (0.95 if spec.bits <= 4 else 1.0) * lost(nearest, weight, 2.0).sum()


def test_weights_on_a_grid_that_their_range_does_not_show_are_found_exactly() -> None:
    spec, scale, zero = QuantSpec(4, 64, symmetric=False), 2.0**-6, 5
    codes = torch.arange(64)[None].expand(3, 64) % 15  # code 15 is never used, so the range is a step short
    weight = (codes - zero).float() * scale

    found, nearest = (method(weight, spec, torch.float16, None) for method in (HalfQuadratic(), RoundToNearest()))

    assert float(lost(nearest, weight, 2.0).sum()) > 0
    assert torch.equal(found.dequantize(), weight)


def test_the_threshold_lies_near_the_minimum_of_what_it_stands_for() -> None:
    e = torch.linspace(-4, 4, 160_001, dtype=torch.float64)
    for x in (0.5, 1.0, 3.0):
        best = float(e[(e.abs().pow(0.7) / 0.7 + 10.0 / 2 * (e - x).square()).argmin()])
        assert float(soft_threshold(torch.tensor(x), 0.7, 10.0)) == pytest.approx(best, abs=0.03)


@pytest.mark.parametrize("spec", [QuantSpec(4, 64, symmetric=False), QuantSpec(3, -1)], ids=["groups", "channel"])
@pytest.mark.parametrize("weight", [torch.zeros(3, 128), torch.full((3, 128), 0.25), torch.full((3, 128), -1e-7)], ids=["zeros", "alike", "tiny"])
def test_groups_without_a_spread_stay_finite_and_close(spec: QuantSpec, weight: Tensor) -> None:
    q = HalfQuadratic()(weight, spec, torch.float16, None)

    assert torch.allclose(q.dequantize(), weight, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "mxfp4", "fp8-block"])
def test_grids_of_floats_are_refitted_too(name: str) -> None:
    spec, weight = parse_scheme(name).weight, weights(128, 256)
    assert spec is not None

    found, nearest = (method(weight, spec, torch.bfloat16, None) for method in (HalfQuadratic(), RoundToNearest()))

    assert lost(found, weight, 2.0).sum() <= lost(nearest, weight, 2.0).sum() * (1 + 1e-6)


@pytest.mark.parametrize("settings", [{"p": 0}, {"p": 1.5}, {"p": True}, {"steps": 0}, {"beta": 0}, {"growth": 0.5}])
def test_settings_out_of_range_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(settings))} is "):
        HalfQuadratic(**settings)
