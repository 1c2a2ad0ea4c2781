"""Imitated activation quantization against compressed-tensors' own functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantkit.core.activations import fake_quantize
from quantkit.core.scheme import ActivationSpec
from quantkit.core.scheme_names import parse_scheme
from quantkit.models.activations import fake_quantize_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_equal_those_of_compressed_tensors(dtype: torch.dtype) -> None:
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    x = (torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 30)[:, None]).to(dtype)
    x[1, 7] = 0
    scale, zero = helpers.compute_dynamic_scales_and_zp(x, arguments, nn.Linear(64, 64))

    expected = forward.fake_quantize(x, scale, zero, arguments)

    assert torch.equal(fake_quantize(x, ActivationSpec()), expected)


def test_only_layers_that_quantize_activations_see_quantized_inputs() -> None:
    modules = {"a": nn.Linear(16, 4), "b": nn.Linear(16, 4), "c": nn.Linear(16, 4)}
    schemes = {"a": parse_scheme("w8a8-int8"), "b": parse_scheme("w4a16"), "elsewhere": parse_scheme("w8a8-int8")}
    x = torch.randn(3, 16)
    plain = {name: module(x) for name, module in modules.items()}

    with fake_quantize_inputs(modules, schemes):
        inside = {name: module(x) for name, module in modules.items()}

    assert torch.equal(inside["a"], modules["a"](fake_quantize(x, ActivationSpec())))
    assert not torch.equal(inside["a"], plain["a"])
    assert torch.equal(inside["b"], plain["b"])
    assert torch.equal(inside["c"], plain["c"])
    assert torch.equal(modules["a"](x), plain["a"])
