"""A layer's input as the integers or 8-bit floats that its kernel would see, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.core.levels import E4M3_TOP, to_e4m3
from quantkit.core.scheme import CHANNEL, ActivationSpec


def quantize_activations(x: Tensor, spec: ActivationSpec, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Levels of activations [..., K], as whole numbers or 8-bit floats' values in x's type, and their scales, broadcast to x.

    A dynamic scale is the largest magnitude of its token (or run of values, or of everything) over the largest level, which for integers is 127.5,
    after compressed-tensors, with codes from -128 to 127.

    Args:
        static_scale: [1], the scale that calibration found; needed where the spec is static.
    """
    if spec.is_static:
        assert static_scale is not None
        scale = static_scale.to(x.dtype)
    else:
        scale = _range(x, spec) / top_of(spec)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if spec.kind == "e4m3":
        return to_e4m3(x / scale).to(x.dtype), scale
    levels = 1 << spec.bits
    return torch.clamp(torch.round(x / scale), -levels // 2, levels // 2 - 1), scale


def fake_quantize(x: Tensor, spec: ActivationSpec, static_scale: Tensor | None = None) -> Tensor:
    """The values of activations [..., K] that their codes stand for, in x's type. Outliers stay as they are.

    bitsandbytes keeps every column in which any token of the batch has an outlier; here each token keeps its own, so that what becomes of it does not
    depend on the others.
    """
    if spec.outliers is None:
        codes, scale = quantize_activations(x, spec, static_scale)
        return codes * scale
    keeps = x.abs() >= spec.outliers
    codes, scale = quantize_activations(x.masked_fill(keeps, 0), spec, static_scale)
    return torch.where(keeps, x, codes * scale)


def top_of(spec: ActivationSpec) -> float:
    """What the largest magnitude becomes: 448 of the 8-bit floats, between the two largest codes of integers, or 127 in LLM.int8."""
    if spec.kind == "e4m3":
        return E4M3_TOP
    levels = 1 << spec.bits
    return (levels - 1) / 2 if spec.outliers is None else levels / 2 - 1


def _range(x: Tensor, spec: ActivationSpec) -> Tensor:
    if spec.group == CHANNEL:
        return x.abs().amax(-1, keepdim=True)
    if spec.group is None:
        return x.abs().amax()
    rest = -x.shape[-1] % spec.group
    runs = torch.nn.functional.pad(x, (0, rest)).unflatten(-1, (-1, spec.group)).abs().amax(-1)
    return runs.repeat_interleave(spec.group, dim=-1)[..., : x.shape[-1]]
