"""The scheme of a container that loses least of a layer which the container cannot hold as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from quantkit.core.scheme import WEIGHT_BITS, Scheme
from quantkit.core.scheme_names import named, parse_scheme
from quantkit.errors import RecipeError
from quantkit.formats.base import Format

_FOUR_BITS = ("w4a16-g32", "w4a16-asym-g32", "nf4")
_EIGHT_BITS = ("w8a16-channel", "fp8-dynamic", "fp8-block", "fp8-tensor", "int8")


def nearest_scheme(fmt: Format, scheme: Scheme, shape: tuple[int, int]) -> Scheme | None:
    """The first of the layer's own scheme, its integers with other zero points, without activations or with more bits, and what else is as wide.

    A calibrated scale of inputs is never made here, so schemes with one are passed over.
    """
    for candidate in _candidates(scheme):
        if not candidate.is_static and fmt.why_not(candidate, shape) is None:
            return candidate
    return None


def _candidates(scheme: Scheme) -> Iterator[Scheme]:
    yield scheme
    spec = scheme.weight
    assert spec is not None
    if spec.kind == "int" and spec.scale == "float":
        for bits in (bits for bits in WEIGHT_BITS if bits >= spec.bits):
            for activation in dict.fromkeys((scheme.activation, None)):
                for symmetric in (spec.symmetric, not spec.symmetric):
                    try:
                        yield named(replace(spec, bits=bits, symmetric=symmetric), activation)
                    except RecipeError:  # no name for these activations
                        continue
    for name in (*_FOUR_BITS, *_EIGHT_BITS) if spec.bits <= 4 else (*_EIGHT_BITS, *_FOUR_BITS):
        yield parse_scheme(name)
