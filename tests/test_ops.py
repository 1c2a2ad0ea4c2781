"""Which kernel runs what: every scheme in every mode against the float product of the weights that it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantkit_kernels.cpu.build import library

from quantkit import ops
from quantkit.core.activations import fake_quantize
from quantkit.core.data_free import quantize, to_int8_rows
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import CHANNEL
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import UsageError

SCHEMES = [
    "w4a16", "w4a16-asym-g32", "w4a16-channel", "w3a16-g64", "w2a16-asym", "w8a16", "w8a16-channel", "w6a16-asym-channel", "w8a8-int8", "w4a8",
    "int8", "nf4", "fp4-dq", "nf4-b512", "nvfp4", "mxfp4", "mxfp8", "fp8-dynamic", "fp8-tensor-a16", "fp8-block", "fp8-block-a16", "w4a16-g16",
]  # fmt: skip
ERROR = {"exact": 1e-6, "fast": 1e-2, "int8": 2e-2}


@pytest.mark.parametrize("mode", ERROR)
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_multiplies_as_its_weight_does(name: str, mode: ops.Mode) -> None:
    scheme = parse_scheme(name)
    assert scheme.weight is not None
    q = quantize(torch.randn(128, 256), scheme.weight, torch.float16)
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
    product = ops.quantized_linear(quantize(torch.randn(128, 256), scheme.weight, torch.float16), scheme, "exact")
    x = torch.randn(40, 256)

    whole = product(x)

    assert torch.equal(torch.cat([product(x[:1]), product(x[1:20]), product(x[20:])]), whole)


@pytest.fixture
def quantized() -> dict[str, QuantizedTensor]:
    weight = torch.randn(128, 256)
    return {name: quantize(weight, parse_scheme(name).weight, torch.float16) for name in SCHEMES}  # type: ignore[arg-type]


@pytest.mark.skipif(not ops.has_fast_bfloat16(), reason="the kernels are these on such processors")
def test_torch_s_kernels_take_the_schemes_they_are_for(quantized: dict[str, QuantizedTensor]) -> None:
    assert [name for name, q in quantized.items() if ops.why_not_int4(q) is None] == ["w4a16", "w4a16-asym-g32", "w4a16-channel", "w4a8"]
    assert [name for name, q in quantized.items() if ops.why_not_int8(q) is None] == ["w8a16-channel", "w8a8-int8"]


@pytest.mark.skipif(library("low_bit_linear") is None, reason="needs a C++ compiler")
def test_the_native_kernel_takes_every_scheme_and_most_by_activations_of_8_bits(quantized: dict[str, QuantizedTensor]) -> None:
    assert all(ops.why_not_native(q, exact=True) is None for q in quantized.values())
    without = [name for name, q in quantized.items() if ops.why_not_native(q, exact=False) is not None]
    assert without == ["nvfp4", "mxfp8", "fp8-dynamic", "fp8-tensor-a16", "fp8-block", "fp8-block-a16", "w4a16-g16"]


@pytest.mark.parametrize("mode", ERROR)
def test_columns_in_activation_order_are_put_in_that_of_their_groups(mode: ops.Mode) -> None:
    scheme = parse_scheme("w4a16-asym-g64")
    order, x = torch.randperm(256), torch.randn(5, 256)
    in_order = quantize(torch.randn(96, 256), scheme.weight, torch.float16)  # type: ignore[arg-type]
    scattered = torch.empty_like(in_order.codes)
    scattered[:, order] = in_order.codes
    groups = torch.empty(256, dtype=torch.int32)
    groups[order] = torch.arange(256, dtype=torch.int32) // 64
    q = replace(in_order, codes=scattered, group_of_column=groups)

    found = ops.quantized_linear(q, scheme, mode)(x)

    sorted_columns = torch.cat([order[start : start + 64].sort().values for start in range(0, 256, 64)])
    same = replace(in_order, codes=scattered[:, sorted_columns])
    assert torch.equal(found, ops.quantized_linear(same, scheme, mode)(x[:, sorted_columns]))
    assert float((found - x @ q.dequantize().T).norm() / found.norm()) < ERROR[mode]


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_groups_of_unequal_size_are_run_as_they_are(mode: ops.Mode) -> None:
    scheme = parse_scheme("w4a16-g64")
    q = quantize(torch.randn(96, 256), scheme.weight, torch.float16)  # type: ignore[arg-type]
    q, x = replace(q, group_of_column=torch.randint(0, 4, (256,), dtype=torch.int32)), torch.randn(5, 256)

    found = ops.quantized_linear(q, scheme, mode)(x)

    assert float((found - x @ q.dequantize().T).norm() / found.norm()) < 1e-6


@pytest.mark.parametrize("name", ["nf4", "nf4-b128", "nf4-b256", "fp4-b1024", "nf4-b4096-dq"])
def test_blocks_that_run_over_the_ends_of_rows_have_their_scales(name: str) -> None:
    q = quantize(torch.randn(48, 192), parse_scheme(name).weight, torch.float16)  # type: ignore[arg-type]

    scales = ops.row_scales(q)

    assert scales.shape[1] < 192 and torch.equal(scales.repeat_interleave(192 // scales.shape[1], dim=1), q.expand(q.scales))


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
