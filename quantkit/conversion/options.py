"""What a user may ask of a conversion. Invalid values cannot exist; whether the source and the data allow it is found out later."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quantkit.conversion.calibration import CalibrationOptions
from quantkit.errors import UsageError, did_you_mean
from quantkit.formats.registry import get_format
from quantkit.given import require_types

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert; every default is the recommended choice.

    Attributes:
        dtype: type of unquantized tensors in the output, "auto" to keep each.
        device: "auto" takes a GPU where there is one.
        max_shard_size: bytes of one weight file.
        requantize: take an already quantized source, decoded, as the original.
        measure: perplexity and KL on held-out calibration rows; only calibrated recipes have any.
    """

    recipe: str = "w4a16-gptq"
    format: str = "compressed-tensors"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    overrides: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    group_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_shard_size: int = 5_000_000_000
    overwrite: bool = False
    fresh: bool = False
    requantize: bool = False
    measure: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("overrides", "ignore"):
            if isinstance(getattr(self, name), str):
                raise UsageError(f"{name} is the string {getattr(self, name)!r}; give a list, as [{getattr(self, name)!r}]")
        require_types(self)
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}; {did_you_mean(self.dtype, DTYPES)}")
        if self.max_shard_size < 1:
            raise UsageError(f"max_shard_size is {self.max_shard_size}; give a size such as 5GB")
        get_format(self.format)
