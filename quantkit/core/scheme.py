"""What a quantized tensor and a quantized layer are: bits, groups, symmetry. Settings only, no tensors, no torch.

A scheme's name is read by a small grammar, so that every combination a container can hold has a name:
`w<bits>a16[-asym][-g<size>|-channel]` for integer weights with 16-bit activations, `w8a8-int8` for integer activations too,
and `none` for a layer that keeps its own type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from quantkit.errors import RecipeError, did_you_mean

CHANNEL = -1
DEFAULT_GROUP = 128
FALLBACK_GROUPS = (64, 32)
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one tensor is stored.

    Attributes:
        bits: width of one code.
        group: values along the input dimension that share a scale; CHANNEL (-1) for one scale a row, None for one a tensor.
        symmetric: the grid is centred on zero and no zero points are stored.
        kind: the family of the grid. Only "int" exists so far.
    """

    bits: int
    group: int | None = DEFAULT_GROUP
    symmetric: bool = True
    kind: Literal["int"] = "int"

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise RecipeError(f"{self.bits} bits are not supported; use one of {', '.join(map(str, WEIGHT_BITS))}")
        if self.group is not None and self.group != CHANNEL and self.group < 8:
            raise RecipeError(f"group size {self.group} is not supported; use 8 or more, or -1 for one scale per channel")

    @property
    def max_code(self) -> int:
        """The largest unsigned code."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The unsigned code that means zero in a symmetric grid."""
        return 1 << (self.bits - 1)

    def group_size(self, in_features: int) -> int:
        """Columns that share one scale in a weight of this many input features."""
        return in_features if self.group in (None, CHANNEL) else self.group

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size(in_features))


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """How a layer's input is quantized at run time: one dynamic symmetric scale a token."""

    bits: int = 8


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one layer is stored and run. `weight` is None for a layer that is left as it is."""

    name: str
    weight: QuantSpec | None
    activation: ActivationSpec | None = None

    @property
    def is_quantized(self) -> bool:
        return self.weight is not None

    def with_group(self, group: int) -> Scheme:
        """The same scheme at another group size, under its own name."""
        assert self.weight is not None
        return _named(replace(self.weight, group=group), self.activation)


UNQUANTIZED = Scheme("none", None)

_WEIGHT_ONLY = re.compile(r"w(?P<bits>\d+)a16(?P<asym>-asym)?(?:-g(?P<group>\d+)|-(?P<channel>channel))?")
_EXAMPLES = ("w2a16", "w3a16", "w4a16", "w5a16", "w6a16", "w8a16", "w4a16-asym", "w4a16-g64", "w8a16-channel", "w8a8-int8", "none")


def _named(weight: QuantSpec, activation: ActivationSpec | None) -> Scheme:
    if activation is not None:
        return Scheme("w8a8-int8", weight, activation)
    group = "-channel" if weight.group == CHANNEL else "" if weight.group == DEFAULT_GROUP else f"-g{weight.group}"
    return Scheme(f"w{weight.bits}a16{'' if weight.symmetric else '-asym'}{group}", weight)


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name such as "w4a16", "w3a16-asym-g64", "w8a16-channel", "w8a8-int8" or "none".

    Raises:
        RecipeError: the name is not of the grammar, or its bits or group do not exist.
    """
    if name == "none":
        return UNQUANTIZED
    if name == "w8a8-int8":
        return _named(QuantSpec(bits=8, group=CHANNEL), ActivationSpec())
    match = _WEIGHT_ONLY.fullmatch(name)
    if match is None:
        raise RecipeError(f"unknown scheme {name!r}; {did_you_mean(name, _EXAMPLES)}")
    group = CHANNEL if match["channel"] else int(match["group"] or DEFAULT_GROUP)
    return _named(QuantSpec(bits=int(match["bits"]), group=group, symmetric=not match["asym"]), None)


def fit_group(scheme: Scheme, in_features: int) -> Scheme | None:
    """The group rule: the scheme at its own group, else at the largest of 64 and 32 that divides, else None (the layer takes a fallback)."""
    weight = scheme.weight
    if weight is None or weight.group in (None, CHANNEL) or in_features % weight.group == 0:
        return scheme
    for group in FALLBACK_GROUPS:
        if group < weight.group and in_features % group == 0:
            return scheme.with_group(group)
    return None
