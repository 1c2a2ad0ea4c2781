"""The containers by the name the user gives, and by what a checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.core.scheme import Scheme
from quantkit.errors import FormatError, UsageError, did_you_mean
from quantkit.formats.base import Format
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.gptq import GPTQ, labelled

FORMATS: dict[str, Format] = {"compressed-tensors": CompressedTensors(), "gptq": GPTQ(zero_offset=1), "gptq-v2": GPTQ(zero_offset=0)}


def get_format(name: str, schemes: Iterable[Scheme] = ()) -> Format:
    """The container of this name for layers of these schemes: `gptq` with an asymmetric layer is its second version.

    Raises:
        UsageError: there is no such container; near names are given.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}; {did_you_mean(name, FORMATS)}")
    if name == "gptq" and any(s.weight is not None and not s.weight.symmetric for s in schemes):
        return FORMATS["gptq-v2"]
    return FORMATS[name]


def format_of(quantization_config: Mapping[str, Any]) -> Format:
    """The container of a checkpoint with this quantization_config; raises FormatError for one that is not read yet."""
    method = quantization_config.get("quant_method")
    if method == "compressed-tensors":
        return FORMATS["compressed-tensors"]
    if method == "gptq":
        return labelled(quantization_config)
    raise FormatError(f"quantization method {method!r} is not read yet; quantkit reads compressed-tensors and gptq")
