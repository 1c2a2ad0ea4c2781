"""Schemes by name. A small grammar, so that every combination a container can hold has a name, and only one:

`w<bits>a16[-asym][-g<size>|-channel]` for integer weights, `w<bits>a8...` and `w<bits>afp8...` with 8-bit activations a token too (`w8a8-int8` per
channel); `fp8-dynamic` (a scale a row, activations a token), `fp8-tensor` and `fp8-static` (one scale a tensor, activations a token or calibrated),
`fp8-block` (128 x 128), and the same without activations (`fp8-a16`, ...); `nf4` and `fp4` as bitsandbytes has them, `[-b<block size>][-dq]`; `int8`
for LLM.int8; `nvfp4`, `mxfp4`, `mxfp8`; and `none` for a layer that keeps its own type.
"""

from __future__ import annotations

import re
from dataclasses import replace

from quantkit.core.scheme import CHANNEL, DEFAULT_GROUP, UNQUANTIZED, ActivationSpec, QuantSpec, Scheme
from quantkit.errors import RecipeError, did_you_mean

FALLBACK_GROUPS = (64, 32)
FP8_BLOCK = (128, 128)

_FLOAT_TOKEN = ActivationSpec(kind="e4m3")
_FLOAT_STATIC = ActivationSpec(kind="e4m3", group=None, is_static=True)
_FIXED = {
    "none": UNQUANTIZED,
    "fp8-dynamic": Scheme("fp8-dynamic", QuantSpec(8, CHANNEL, kind="e4m3"), _FLOAT_TOKEN),
    "fp8-tensor": Scheme("fp8-tensor", QuantSpec(8, None, kind="e4m3"), _FLOAT_TOKEN),
    "fp8-static": Scheme("fp8-static", QuantSpec(8, None, kind="e4m3"), _FLOAT_STATIC),
    "fp8-channel-static": Scheme("fp8-channel-static", QuantSpec(8, CHANNEL, kind="e4m3"), _FLOAT_STATIC),
    "fp8-tensor-dynamic": Scheme("fp8-tensor-dynamic", QuantSpec(8, None, kind="e4m3"), ActivationSpec(kind="e4m3", group=None)),
    "fp8-a16": Scheme("fp8-a16", QuantSpec(8, CHANNEL, kind="e4m3")),
    "fp8-tensor-a16": Scheme("fp8-tensor-a16", QuantSpec(8, None, kind="e4m3")),
    "fp8-block-a16": Scheme("fp8-block-a16", QuantSpec(8, FP8_BLOCK, kind="e4m3")),
    "fp8-block": Scheme("fp8-block", QuantSpec(8, FP8_BLOCK, kind="e4m3"), ActivationSpec(kind="e4m3", group=128)),
    "int8": Scheme("int8", QuantSpec(8, CHANNEL, scale="row maximum"), ActivationSpec(outliers=6.0)),
    "nvfp4": Scheme("nvfp4", QuantSpec(4, 16, kind="e2m1", scale="e4m3")),
    "mxfp4": Scheme("mxfp4", QuantSpec(4, 32, kind="e2m1", scale="e8m0")),
    "mxfp8": Scheme("mxfp8", QuantSpec(8, 32, kind="e4m3", scale="e8m0")),
}
_ACTIVATIONS = {"16": None, "8": ActivationSpec(), "fp8": _FLOAT_TOKEN}
_INTEGER = re.compile(r"w(?P<bits>\d+)a(?P<activation>16|8|fp8)(?P<asym>-asym)?(?:-g(?P<group>\d+)|-(?P<channel>channel))?")
_TABLE = re.compile(r"(?P<kind>nf4|fp4)(?:-b(?P<block>\d+))?(?P<dq>-dq)?")
_DEFAULT_BLOCK = 64
_EXAMPLES = (
    "w2a16", "w3a16", "w4a16", "w5a16", "w6a16", "w8a16", "w4a16-asym", "w4a16-g64", "w8a16-channel", "w8a8-int8", "w4a8", "nf4-dq", "nf4-b128",
    "nf4", "fp4", *_FIXED,
)  # fmt: skip


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name such as "w4a16", "w3a16-asym-g64", "w8a8-int8", "fp8-block", "nf4-dq" or "none".

    Raises:
        RecipeError: the name is not of the grammar, or its bits or group do not exist.
    """
    if name in _FIXED:
        return _FIXED[name]
    if name == "w8a8-int8":
        return named(QuantSpec(bits=8, group=CHANNEL), ActivationSpec())
    if match := _INTEGER.fullmatch(name):
        group = CHANNEL if match["channel"] else int(match["group"] or DEFAULT_GROUP)
        spec = QuantSpec(bits=int(match["bits"]), group=group, symmetric=not match["asym"])
        return named(spec, _ACTIVATIONS[match["activation"]])
    if match := _TABLE.fullmatch(name):
        spec = QuantSpec(4, int(match["block"] or _DEFAULT_BLOCK), kind=match["kind"], scale="nested" if match["dq"] else "float")
        return named(spec, None)
    raise RecipeError(f"unknown scheme {name!r}; {did_you_mean(name, _EXAMPLES)}")


def named(weight: QuantSpec, activation: ActivationSpec | None) -> Scheme:
    """The scheme of these settings, under its name.

    Raises:
        RecipeError: no name stands for them.
    """
    for scheme in _FIXED.values():
        if (scheme.weight, scheme.activation) == (weight, activation):
            return scheme
    if weight.kind == "int" and weight.scale == "float" and activation in _ACTIVATIONS.values() and isinstance(weight.group, int):
        return Scheme(_integer_name(weight, activation), weight, activation)
    if weight.is_flat and activation is None:
        block = "" if weight.group == _DEFAULT_BLOCK else f"-b{weight.group}"
        return Scheme(f"{weight.kind}{block}{'-dq' if weight.scale == 'nested' else ''}", weight)
    raise RecipeError(f"there is no scheme of {weight.bits}-bit {weight.kind} weights in groups of {weight.group} with activations {activation}")


def _integer_name(weight: QuantSpec, activation: ActivationSpec | None) -> str:
    if activation == ActivationSpec() and (weight.bits, weight.group, weight.symmetric) == (8, CHANNEL, True):
        return "w8a8-int8"
    group = "-channel" if weight.group == CHANNEL else "" if weight.group == DEFAULT_GROUP else f"-g{weight.group}"
    width = next(name for name, spec in _ACTIVATIONS.items() if spec == activation)
    return f"w{weight.bits}a{width}{'' if weight.symmetric else '-asym'}{group}"


def takes_group(scheme: Scheme) -> bool:
    """Whether another group size makes another scheme; floats have the groups of their format."""
    weight = scheme.weight
    return weight is not None and weight.kind == "int" and weight.scale == "float" and scheme.name != "w8a8-int8"


def with_group(scheme: Scheme, group: int) -> Scheme:
    """The same scheme at another group size, under its own name."""
    assert scheme.weight is not None
    return named(replace(scheme.weight, group=group), scheme.activation)


def fit_group(scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
    """The group rule for a weight [N, K]: the scheme at its own group, else at the largest of 64 and 32 that divides, else None (a fallback).

    Blocks of rows and columns fall to FP8 with one scale a row where they do not divide both dimensions.
    """
    weight, (rows, columns) = scheme.weight, shape
    if weight is None or weight.group in (None, CHANNEL) or weight.is_flat:
        return scheme
    if isinstance(weight.group, tuple):
        return scheme if rows % weight.group[0] == 0 and columns % weight.group[1] == 0 else parse_scheme("fp8-dynamic")
    if columns % weight.group == 0:
        return scheme
    for group in FALLBACK_GROUPS if takes_group(scheme) else ():
        if group < weight.group and columns % group == 0:
            return with_group(scheme, group)
    return None
