"""What a user may ask of a conversion. Invalid values cannot exist; whether the source and the data allow it is found out later."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quantkit.conversion.budget import Budget, read_budget
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.rotation import rotation_named
from quantkit.errors import UsageError, did_you_mean
from quantkit.formats.engines import find_engine
from quantkit.formats.kv_scales import kv_cache_name
from quantkit.formats.registry import PLAIN, get_format
from quantkit.given import require_types

DEFAULT_RECIPE = "w4a16-gptq"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert; every default is the recommended choice.

    Attributes:
        recipe: None is w4a16-gptq, or no recipe at all where a quantized source only changes its container.
        format: the container; None is compressed-tensors. A source that is quantized already keeps its codes, scales and zero points in a container
            that is named here, unless something else asks for quantizing; "bf16" writes ordinary weights.
        dtype: type of unquantized tensors in the output, "auto" to keep each.
        device: "auto" takes a GPU where there is one.
        max_shard_size: bytes of one weight file.
        target_bpw: choose schemes by measurement so that the quantized linears come to at most this many bits a weight; "file:4.5" counts all files.
        max_kl: the same, with the fewest bits whose KL divergence on held-out rows is at most this.
        allocation: a file, or the folder of an earlier conversion, whose measurement is used in place of a new one; a new name gets the new one.
        kv_cache: calibrate scales for a KV cache, "fp8" with one a tensor, "fp8-head" with one a head; "none" against a recipe that does.
        rotation: "hadamard" folds a rotation of the hidden states into all weights before they are rounded; "none" against a recipe that does.
        moe_calibrate_all_experts: every expert sees every calibration token, whoever it is routed to; None is what the recipe says.
        requantize: take an already quantized source, decoded, as the original; where only a container is asked for, just the layers it cannot hold.
        target_engines: engines that must load the output, or nothing is done.
        measure: perplexity and KL on held-out calibration rows; only calibrated recipes have any.
    """

    recipe: str | None = None
    format: str | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    overrides: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    group_size: int | None = None
    target_bpw: float | int | str | None = None
    max_kl: float | int | None = None
    allocation: str | None = None
    kv_cache: str | None = None
    rotation: str | None = None
    moe_calibrate_all_experts: bool | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_shard_size: int = 5_000_000_000
    overwrite: bool = False
    fresh: bool = False
    requantize: bool = False
    target_engines: tuple[str, ...] = ()
    measure: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("overrides", "ignore", "target_engines"):
            if isinstance(getattr(self, name), str):
                raise UsageError(f"{name} is the string {getattr(self, name)!r}; give a list, as [{getattr(self, name)!r}]")
        require_types(self)
        if self.dtype not in DTYPES:
            raise UsageError(f"unknown dtype {self.dtype!r}; {did_you_mean(self.dtype, DTYPES)}")
        if self.max_shard_size < 1:
            raise UsageError(f"max_shard_size is {self.max_shard_size}; give a size such as 5GB")
        get_format(self.container)
        kv_cache_name(self.kv_cache)
        rotation_named(self.rotation)
        for engine in self.target_engines:
            find_engine(engine)
        if self.container == PLAIN.name:
            self._check_plain()
        read_budget(self.target_bpw, self.max_kl)
        if self.max_kl is not None and not self.measure:
            raise UsageError("max-kl is kept to by measuring, which measure=False (--no-measure) turns off; leave one of them out")

    def _check_plain(self) -> None:
        if self.asks_to_quantize:
            asked = "a recipe (an override, a budget, a KV cache, a rotation)"
            raise UsageError(f"bf16 writes ordinary weights, and {asked} asks for others; leave one of them out")
        if self.dtype not in ("auto", "bfloat16"):
            raise UsageError(f"format bf16 writes bfloat16, and dtype is {self.dtype}; leave one of them out")

    @property
    def container(self) -> str:
        return self.format or "compressed-tensors"

    @property
    def asks_to_quantize(self) -> bool:
        """Whether anything given is about how weights are to be rounded, or what is to be calibrated."""
        cache, rotation = kv_cache_name(self.kv_cache), rotation_named(self.rotation)
        given = (self.recipe, self.group_size, self.target_bpw, self.max_kl, self.allocation, cache, rotation, self.moe_calibrate_all_experts)
        return bool(self.overrides or self.ignore) or any(each is not None for each in given)

    @property
    def carried_dtype(self) -> torch.dtype | None:
        """The type of unquantized tensors; None keeps each."""
        return torch.bfloat16 if self.container == PLAIN.name else DTYPES[self.dtype]

    @property
    def budget(self) -> Budget | None:
        return read_budget(self.target_bpw, self.max_kl)
