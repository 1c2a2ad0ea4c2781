"""Run-time quantization of a layer's input, imitated in a forward pass in floating point, as an integer kernel would see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from quantkit.core.activations import fake_quantize
from quantkit.core.scheme import ActivationSpec, Scheme


@contextmanager
def fake_quantize_inputs(
    modules: Mapping[str, nn.Module], schemes: Mapping[str, Scheme], static_scales: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the body, quantize the input of every module whose scheme quantizes activations.

    Args:
        modules: linears by checkpoint name.
        schemes: the checkpoint's quantized layers; names that are not among the modules are passed over.
        static_scales: the calibrated scale [1] of every input whose scheme has one.
    """
    handles = []
    for name, module in modules.items():
        scheme = schemes.get(name)
        if scheme is not None and scheme.activation is not None:
            handles.append(module.register_forward_pre_hook(_quantizing(scheme.activation, (static_scales or {}).get(name))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _quantizing(spec: ActivationSpec, static_scale: Tensor | None) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize(inputs[0], spec, static_scale), *inputs[1:])

    return hook
