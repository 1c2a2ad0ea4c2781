"""Tuned weights: they begin where they are told to, stay what can be stored, and pass gradients straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import CHANNEL, QuantSpec
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import RecipeError
from quantkit.methods.base import Statistics
from quantkit.methods.gptq import GPTQ
from quantkit.methods.registry import get_rounding
from quantkit.methods.rtn import RoundToNearest
from quantkit.methods.tuned import Tuned, TunedWeight, TuningSteps, error_by_token, kl_by_token
from tests.methods.test_gptq import correlated, weights

SPECS = [
    pytest.param(QuantSpec(bits=bits, group=group, symmetric=symmetric), id=f"w{bits}-{'sym' if symmetric else 'asym'}-{group}")
    for bits in (2, 3, 4)
    for group in (32, CHANNEL)
    for symmetric in (True, False)
]


OTHER_SPECS = [pytest.param(parse_scheme(name).weight, id=name) for name in ("nvfp4", "mxfp4", "fp8-dynamic", "fp8-tensor", "nf4", "nf4-dq", "int8")]


def started(spec: QuantSpec, dtype: torch.dtype = torch.float16) -> tuple[TunedWeight, QuantizedTensor]:
    weight = weights(6, 96) + 0.02
    q = RoundToNearest()(weight, spec, dtype, None)
    return TunedWeight(weight, q), q


def shaken(tuned: TunedWeight, size: float = 0.4) -> TunedWeight:
    """Everything that is tuned moved at random."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value, by in ((tuned.place, size), (tuned.share, 0.1), (tuned.zero, size)):
            value.add_(value.requires_grad * by * torch.randn(value.shape, generator=generator))
    tuned.settle()
    return tuned


@pytest.mark.parametrize("spec", SPECS + OTHER_SPECS)
def test_tuning_begins_at_what_it_is_given_to_the_bit(spec: QuantSpec) -> None:
    tuned, q = started(spec)

    assert tuned.quantized().equals(q)
    assert torch.equal(tuned(), q.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS + OTHER_SPECS)
def test_what_is_judged_is_what_is_stored(spec: QuantSpec, dtype: torch.dtype) -> None:
    tuned = shaken(started(spec, dtype)[0], size=5.0)
    q = tuned.quantized()

    assert torch.equal(tuned(), q.dequantize())
    assert (spec.kind != "int" or spec.scale != "float" or q.scale.dtype == dtype) and int(q.codes.max()) <= spec.max_code
    assert q.zero is None or (int(q.zero.min()) >= 0 and int(q.zero.max()) <= spec.max_code)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_codes_that_were_continuous(spec: QuantSpec) -> None:
    tuned = shaken(started(spec, torch.float32)[0])
    upstream = torch.randn(6, 96, generator=torch.Generator().manual_seed(4))

    (tuned() * upstream).sum().backward()

    q = tuned.quantized()
    groups = (6, -1, spec.group_size(96))
    up, codes = upstream.double().numpy().reshape(groups), q.codes.double().numpy().reshape(groups)
    scale = q.scale.double().numpy()[..., None]
    zero = np.full_like(scale, spec.mid_code) if q.zero is None else q.zero.double().numpy()[..., None]
    first = scale / tuned.share.detach().double().numpy()
    np.testing.assert_allclose(tuned.place.grad.numpy(), up * scale, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(tuned.share.grad.numpy(), (up * (codes - zero)).sum(-1, keepdims=True) * first, rtol=1e-4, atol=1e-6)
    if spec.symmetric:
        assert tuned.zero.grad is None
    else:
        np.testing.assert_allclose(tuned.zero.grad.numpy(), -(up * scale).sum(-1, keepdims=True), rtol=1e-4, atol=1e-6)


def test_error_is_relative_to_each_token_whatever_its_size() -> None:
    wanted = torch.randn(2, 3, 8) * torch.tensor([1.0, 100.0, 1e4])[:, None]
    output = wanted + torch.randn(2, 3, 8) * 0.1

    expected = ((output - wanted).double().numpy() ** 2).sum(-1) / (wanted.double().numpy() ** 2).sum(-1)
    np.testing.assert_allclose(error_by_token(output, wanted).numpy(), expected, rtol=1e-4)
    assert torch.isfinite(error_by_token(output, torch.zeros_like(wanted))).all()


def test_divergence_is_that_of_the_two_distributions() -> None:
    original, quantized = torch.randn(2, 5, 11) * 3, torch.randn(2, 5, 11) * 3

    p, q = (np.exp(each.double().numpy()) / np.exp(each.double().numpy()).sum(-1, keepdims=True) for each in (original, quantized))
    np.testing.assert_allclose(kl_by_token(original, quantized).numpy(), (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS + OTHER_SPECS[:-1])
def test_steps_reach_another_target_and_end_in_what_can_be_stored(spec: QuantSpec) -> None:
    tuned, q = started(spec)
    target = weights(6, 96, seed=9) * 0.5 + 0.5 * q.dequantize()
    settings = Tuned(steps=150, rate=0.05, scale_rate=0.003, zero_rate=0.01)
    steps = TuningSteps([tuned], settings)

    for _ in range(settings.steps):
        (tuned() - target).square().sum().backward()
        steps.take()

    left, before = ((each.dequantize() - target).square().sum() for each in (tuned.quantized(), q))
    assert left < 0.6 * before


def test_alone_it_rounds_as_gptq_does() -> None:
    spec, seen = QuantSpec(bits=3, group=32), Statistics(correlated(96), 400)

    assert Tuned()(weights(6, 96), spec, torch.float16, seen).equals(GPTQ()(weights(6, 96), spec, torch.float16, seen))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps is 0; give a whole number from 1 on, such as 100"), ({"tokens": 1.5}, "tokens is 1.5"), ({"rate": -1}, "rate is -1"),
        ({"scale_rate": "fast"}, "scale_rate is 'fast'"), ({"zero_rate": 2}, "zero_rate is 2; give a number from 0 to 1"), ({"seed": None}, "seed"),
        ({"stepz": 3}, "did you mean 'steps'"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_name(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        get_rounding("tuned", settings)
