"""What an unquantized model is quantized to while it streams in: from its weights alone, without data."""

from __future__ import annotations

import torch

from quantkit.core import data_free
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import fit_group, parse_scheme
from quantkit.errors import UsageError, did_you_mean
from quantkit.formats.opened import OpenedCheckpoint

AT_LOAD = {"int8": "w8a16-channel", "fp8": "fp8-dynamic", "w4": "w4a16", "nf4": "nf4"}
_FALLBACK = "w8a16-channel"


def require_known(name: str) -> None:
    """Raises UsageError for a quantization that does not exist."""
    if name not in AT_LOAD:
        raise UsageError(f"unknown quantization {name!r}; {did_you_mean(name, AT_LOAD)}")


def require_unquantized(opened: OpenedCheckpoint, source: str, name: str) -> None:
    """Raises UsageError where the checkpoint's layers have a scheme already."""
    schemes = sorted({scheme.name for scheme in opened.schemes.values()})
    if schemes:
        raise UsageError(f"{source} is quantized already ({', '.join(schemes)}); leave --quantization {name} out, or give the model it was made from")


def scheme_at_load(name: str, shape: tuple[int, int]) -> Scheme:
    """The scheme of a weight [N, K]. Groups of 128 fall to 64 or 32 where those divide K, else to 8 bits with one scale a row."""
    return fit_group(parse_scheme(AT_LOAD[name]), shape) or parse_scheme(_FALLBACK)


def quantize(weight: torch.Tensor, scheme: Scheme, model_dtype: torch.dtype) -> QuantizedTensor:
    """A weight [N, K] as a conversion without data stores it: scales in the model's own 16-bit type, those of whole numbers below 8 bits searched.

    NF4 is as bitsandbytes makes it, with scales in float32. At 8 bits a search made the load of a 0.9 GB model take minutes in place of seconds.
    """
    spec = scheme.weight
    assert spec is not None
    dtype = torch.float32 if spec.is_flat else torch.bfloat16 if model_dtype == torch.bfloat16 else torch.float16
    return data_free.quantize(weight, spec, dtype, search=spec.kind == "int" and spec.bits < 8)
