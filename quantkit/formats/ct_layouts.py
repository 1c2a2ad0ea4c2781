"""The tensors of one layer in each of compressed-tensors' layouts.

Packed integers are stored unsigned along K, their zero points, unsigned too, along N; scales [N, G] in the model's type. Files written before
mid-2026 keep 32 // bits codes a word at 3, 5 and 6 bits: their width tells, and they are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from quantkit.core.packing import pack, packed_words, unpack, unpack_whole
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import CHANNEL, QuantSpec, Scheme
from quantkit.errors import FormatError
from quantkit.formats.base import assembled, require_parts

Layout = Literal["pack-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"]

PART_NAMES: dict[Layout, tuple[str, ...]] = {
    "pack-quantized": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "int-quantized": ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale"),
    "float-quantized": ("weight", "weight_scale", "input_scale"),
    "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
    "mxfp4-pack-quantized": ("weight_packed", "weight_scale"),
    "mxfp8-quantized": ("weight", "weight_scale"),
}
"""Layers of integers with integer activations may be packed too, where somebody asked for it."""


def encode(q: QuantizedTensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors by their names under the module."""
    if layout == "pack-quantized":
        return _encode_packed(q)
    if layout == "int-quantized":
        parts = {"weight": (q.codes.to(torch.int16) - q.spec.mid_code).to(torch.int8), "weight_scale": q.scale}
        return parts | ({} if q.zero is None else {"weight_zero_point": (q.zero - q.spec.mid_code).to(torch.int8)})
    if layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        packed = q.codes[:, ::2] | q.codes[:, 1::2] << 4
        if q.divisor is None:
            return {"weight_packed": packed, "weight_scale": q.scale.view(torch.uint8)}
        return {"weight_packed": packed, "weight_scale": q.scale, "weight_global_scale": q.divisor}
    scale = q.scale.view(torch.uint8) if layout == "mxfp8-quantized" else q.scale.reshape(1) if q.spec.group is None else q.scale
    parts = {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
    return parts | ({} if q.input_scale is None else {"input_scale": q.input_scale})


def decode(parts: Mapping[str, Tensor], scheme: Scheme, layout: Layout) -> QuantizedTensor:
    """The inverse; raises FormatError when parts are missing, of the wrong shape, or mean something else than the scheme."""
    spec = scheme.weight
    assert spec is not None
    if layout == "pack-quantized" or "weight_shape" in parts:
        return _decode_packed(parts, spec)
    scale = part(parts, "weight_scale")
    if layout == "int-quantized":
        codes = (part(parts, "weight").to(torch.int16) + spec.mid_code).to(torch.uint8)
        zero = None
        if "weight_zero_point" in parts or not spec.symmetric:
            zero = _as_rows(part(parts, "weight_zero_point"), codes.shape[0]).to(torch.int16) + spec.mid_code
            zero = _unless_symmetric(zero, spec)
        return assembled(spec, codes, _as_rows(scale, codes.shape[0]), zero)
    if layout in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        packed = part(parts, "weight_packed")
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        if layout == "mxfp4-pack-quantized":
            return assembled(spec, codes, scale.view(torch.float8_e8m0fnu))
        return assembled(spec, codes, scale, divisor=part(parts, "weight_global_scale").reshape(1))
    codes = part(parts, "weight").view(torch.uint8)
    if layout == "mxfp8-quantized":
        return assembled(spec, codes, scale.view(torch.float8_e8m0fnu))
    input_scale = part(parts, "input_scale").reshape(1) if scheme.is_static else None
    shaped = scale.reshape(1, 1) if spec.group is None else _as_rows(scale, codes.shape[0]) if spec.group == CHANNEL else scale
    return replace(assembled(spec, codes, shaped), input_scale=input_scale)


def _encode_packed(q: QuantizedTensor) -> dict[str, Tensor]:
    parts = {
        "weight_packed": pack(q.codes, q.spec.bits),
        "weight_scale": q.scale,
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero is not None:
        parts["weight_zero_point"] = pack(q.zero.T, q.spec.bits).T.contiguous()
    return parts


def _decode_packed(parts: Mapping[str, Tensor], spec: QuantSpec) -> QuantizedTensor:
    scale = part(parts, "weight_scale")
    rows, columns = (int(n) for n in part(parts, "weight_shape"))
    words = part(parts, "weight_packed")
    dense = words.shape[1] == packed_words(columns, spec.bits)
    if not dense and words.shape[1] != -(-columns // (32 // spec.bits)):
        needed = packed_words(columns, spec.bits)
        raise FormatError(f"weight_packed has {words.shape[1]} words a row; {columns} codes of {spec.bits} bits need {needed}")
    read = unpack if dense else unpack_whole
    zero = None
    if "weight_zero_point" in parts or not spec.symmetric:
        zero = read(part(parts, "weight_zero_point").T.contiguous(), spec.bits, rows).T.contiguous().to(torch.int16)
        zero = _unless_symmetric(zero, spec)
    return assembled(spec, read(words, spec.bits, columns), _as_rows(scale, rows), zero, parts.get("weight_g_idx"))


def part(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """One tensor of the layer; raises FormatError where it is absent."""
    require_parts(parts, [name])
    return parts[name]


def _unless_symmetric(zero: Tensor, spec: QuantSpec) -> Tensor | None:
    """None for a symmetric grid; raises FormatError where zero points are stored with one, and are not its own."""
    if spec.symmetric and bool((zero != spec.mid_code).any()):
        other = int(zero[zero != spec.mid_code][0])
        raise FormatError(f"weights are said to be symmetric, and a weight_zero_point is {other}, not {spec.mid_code}; one of the two is wrong")
    return None if spec.symmetric else zero


def _as_rows(scale: Tensor, rows: int) -> Tensor:
    return scale if scale.ndim == 2 else scale.reshape(rows, -1)
