"""What a user may ask of a conversion. Invalid values cannot exist; whether the source and the data allow it is found out later."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quantkit.conversion.budget import Budget, read_budget
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
        target_bpw: choose schemes by measurement so that the quantized linears come to at most this many bits a weight; "file:4.5" counts all files.
        max_kl: the same, with the fewest bits whose KL divergence on held-out rows is at most this.
        allocation: a file, or the folder of an earlier conversion, whose measurement is used in place of a new one; a new name gets the new one.
        moe_calibrate_all_experts: every expert sees every calibration token, whoever it is routed to; None is what the recipe says.
        requantize: take an already quantized source, decoded, as the original.
        measure: perplexity and KL on held-out calibration rows; only calibrated recipes have any.
    """

    recipe: str = "w4a16-gptq"
    format: str = "compressed-tensors"
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    overrides: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    group_size: int | None = None
    target_bpw: float | int | str | None = None
    max_kl: float | int | None = None
    allocation: str | None = None
    moe_calibrate_all_experts: bool | None = None
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
        read_budget(self.target_bpw, self.max_kl)
        if self.max_kl is not None and not self.measure:
            raise UsageError("max-kl is kept to by measuring, which measure=False (--no-measure) turns off; leave one of them out")

    @property
    def budget(self) -> Budget | None:
        return read_budget(self.target_bpw, self.max_kl)
