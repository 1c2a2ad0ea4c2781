"""Half-quadratic quantization lowers the error it is for, and a norm below 1 is another goal than squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import QuantSpec
from quantkit.errors import RecipeError
from quantkit.methods.hqq import HalfQuadratic, soft_threshold
from quantkit.methods.rtn import RoundToNearest, SearchedScales

SPECS = [QuantSpec(bits, 64, symmetric) for bits in (2, 3, 4) for symmetric in (True, False)]


def weights() -> Tensor:
    return torch.distributions.StudentT(3.0).sample((24, 256)) * 0.02


def lost(q: QuantizedTensor, weight: Tensor, p: float) -> float:
    return float((q.dequantize() - weight).double().abs().pow(p).sum())


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"w{s.bits}-{'sym' if s.symmetric else 'asym'}")
def test_its_own_error_is_lower_than_that_of_spanning_the_range(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    weight = weights()
    found, nearest, squares = (method(weight, spec, torch.float16, None) for method in (HalfQuadratic(), RoundToNearest(), SearchedScales()))

    assert lost(found, weight, 0.7) < 0.97 * lost(nearest, weight, 0.7)
    assert lost(squares, weight, 2.0) < lost(found, weight, 2.0)


def test_the_threshold_lies_near_the_minimum_of_what_it_stands_for() -> None:
    e = torch.linspace(-4, 4, 160_001, dtype=torch.float64)
    for x in (0.5, 1.0, 3.0):
        best = float(e[(e.abs().pow(0.7) + 10.0 / 2 * (e - x).square()).argmin()])
        assert float(soft_threshold(torch.tensor(x), 0.7, 10.0)) == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("settings", [{"p": 0}, {"p": 1.5}, {"steps": -1}, {"beta": 0}, {"growth": 0.5}])
def test_settings_out_of_range_are_named(settings: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(settings))} is "):
        HalfQuadratic(**settings)
