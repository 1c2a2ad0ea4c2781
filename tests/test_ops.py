"""Which kernel runs what: every scheme in every mode against the float product of the weights that it stands for."""

from __future__ import annotations

import pytest
import torch

from quantkit import ops
from quantkit.core.activations import fake_quantize
from quantkit.core.data_free import quantize, to_int8_rows
from quantkit.core.scheme import CHANNEL
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import UsageError

SCHEMES = ["w4a16", "w4a16-asym-g32", "w4a16-channel", "w3a16-g64", "w2a16-asym", "w8a16", "w8a16-channel", "w6a16-asym-channel", "w8a8-int8"]
ERROR = {"exact": 1e-6, "fast": 1e-2, "int8": 2e-2}


@pytest.mark.parametrize("mode", ERROR)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_multiplies_as_its_weight_does(name: str, mode: ops.Mode) -> None:
    scheme = parse_scheme(name)
    assert scheme.weight is not None
    q = quantize(torch.randn(96, 256), scheme.weight, torch.float16)
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 256)

        y = ops.quantized_linear(q, scheme, mode)(x)

        seen = x if scheme.activation is None else fake_quantize(x, scheme.activation)
        expected = seen.double() @ q.dequantize(torch.float64).T
        assert y.dtype == x.dtype
        assert float((y - expected).norm() / expected.norm()) < ERROR[mode]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_token_is_the_same_to_the_bit_in_any_batch_in_exact_mode(name: str) -> None:
    scheme = parse_scheme(name)
    assert scheme.weight is not None
    product = ops.quantized_linear(quantize(torch.randn(96, 256), scheme.weight, torch.float16), scheme, "exact")
    x = torch.randn(40, 256)

    whole = product(x)

    assert torch.equal(torch.cat([product(x[:1]), product(x[1:20]), product(x[20:])]), whole)


@pytest.mark.skipif(not ops.has_fast_bfloat16(), reason="the kernels are these on such processors")
def test_kernels_take_the_schemes_they_are_for() -> None:
    weight = torch.randn(96, 256)
    q = {name: quantize(weight, parse_scheme(name).weight, torch.float16) for name in SCHEMES}  # type: ignore[arg-type]

    assert [name for name in SCHEMES if ops.why_not_int4(q[name]) is None] == ["w4a16", "w4a16-asym-g32", "w4a16-channel"]
    assert [name for name in SCHEMES if ops.why_not_int8(q[name]) is None] == ["w8a16-channel", "w8a8-int8"]


def test_rounding_again_to_8_bits_a_row_is_the_rounding_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantize(torch.randn(37, 256), parse_scheme("w4a16-asym").weight, torch.bfloat16)  # type: ignore[arg-type]
    whole = to_int8_rows(q)

    monkeypatch.setattr("quantkit.core.data_free._AT_ONCE", 1024)

    assert to_int8_rows(q).equals(whole) and whole.spec.group == CHANNEL
    step = q.dequantize().abs().amax(1, keepdim=True) / 127.5
    assert ((whole.dequantize() - q.dequantize()).abs() <= step * 0.5001).all()


def test_int8_needs_a_processor_with_its_kernel() -> None:
    with pytest.raises(UsageError, match=r"mode 'int8' cannot be used here: .*; use 'fast' or 'exact'"):
        ops.require_mode("int8", torch.device("meta"))
