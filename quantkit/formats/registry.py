"""The containers by the name the user gives, and by what a checkpoint says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from quantkit.core.scheme import Scheme
from quantkit.errors import FormatError, UsageError, did_you_mean
from quantkit.formats.awq import AWQ
from quantkit.formats.base import Format
from quantkit.formats.bitsandbytes import BitsAndBytes
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.fp8 import FP8
from quantkit.formats.gptq import GPTQ, labelled
from quantkit.formats.plain import Plain

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(), "gptq": GPTQ(zero_offset=1), "gptq-v2": GPTQ(zero_offset=0), "awq": AWQ(), "fp8": FP8(),
    "bitsandbytes": BitsAndBytes(),
}  # fmt: skip


CONTAINERS = tuple(name for name in FORMATS if name != "gptq-v2")
"""Every container once: GPTQ is written as its second version where it has to be."""
PLAIN = Plain()
READ_METHODS = ", ".join(CONTAINERS)
"""What a checkpoint may call its container, in words."""


def get_format(name: str, schemes: Iterable[Scheme] = (), model_dtype: torch.dtype | None = None) -> Format:
    """The container of this name for layers of these schemes: `gptq` with an asymmetric layer is its second version.

    "bf16" is none: ordinary weights.

    Args:
        model_dtype: the type that weights were in, which bitsandbytes writes down.

    Raises:
        UsageError: there is no such container; near names are given.
    """
    if name == PLAIN.name:
        return PLAIN
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}; {did_you_mean(name, [*FORMATS, PLAIN.name])}")
    if name == "gptq" and any(s.weight is not None and not s.weight.symmetric for s in schemes):
        return FORMATS["gptq-v2"]
    if name == "bitsandbytes" and model_dtype is not None:
        return BitsAndBytes(model_dtype)
    return FORMATS[name]


def format_of(quantization_config: Mapping[str, Any]) -> Format:
    """The container of a checkpoint with this quantization_config; raises FormatError for one that is not read yet."""
    method = quantization_config.get("quant_method")
    if method == "gptq":
        return labelled(quantization_config)
    if method == "bitsandbytes":
        return BitsAndBytes(getattr(torch, str(quantization_config.get("bnb_4bit_compute_dtype")), torch.bfloat16))
    if method not in FORMATS:
        raise FormatError(f"quantization method {method!r} is not read yet; quantkit reads {READ_METHODS}")
    return FORMATS[method]
