"""Every scheme is run by the Triton kernels where a GPU is the device."""

from __future__ import annotations

import pytest
import torch
from quantkit_kernels.gpu import low_bit_linear as on_gpu

from quantkit import ops
from quantkit.core.activations import fake_quantize
from quantkit.core.data_free import quantize
from quantkit.core.scheme_names import parse_scheme
from tests.test_ops import ERROR, SCHEMES


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_s_kernel_takes_every_scheme_too(name: str, mode: ops.Mode, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """On a GPU where there is one; elsewhere in the interpreter, which takes the CPU's place."""
    monkeypatch.setattr(ops, "low_bit_kernels", lambda _: on_gpu)
    for choice in ("why_not_int4", "why_not_int8", "why_not_int8_activations"):
        monkeypatch.setattr(ops, choice, lambda _: "a kernel of CPUs")
    scheme = parse_scheme(name)
    q = quantize(torch.randn(128, 256), scheme.weight, torch.float16).to(device)  # type: ignore[arg-type]
    assert all(ops.why_not_native(q, exact=exact) is None for exact in (True, False))
    x = torch.randn(3, 256, device=device)

    y = ops.quantized_linear(q, scheme, mode)(x)

    seen = x if scheme.activation is None else fake_quantize(x, scheme.activation)
    expected = seen.double() @ q.dequantize(torch.float64).T
    assert float((y - expected).norm() / expected.norm()) < ERROR[mode]


def test_a_device_without_kernels_and_a_refusal_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    ops.low_bit_kernels.cache_clear()
    monkeypatch.setenv("QUANTKIT_NATIVE", "0")

    assert ops.low_bit_kernels(torch.device("cuda")) is None and ops.low_bit_kernels(torch.device("meta")) is None
    ops.low_bit_kernels.cache_clear()
    monkeypatch.delenv("QUANTKIT_NATIVE")
    assert ops.low_bit_kernels(torch.device("cuda")) is on_gpu
