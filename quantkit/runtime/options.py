"""How an engine is set up. Invalid settings cannot exist; what depends on the model is checked while it loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from quantkit.errors import UsageError, did_you_mean
from quantkit.ops import Mode
from quantkit.runtime.quantization import require_known

NGRAM = "ngram"
_COUNTS = (
    "block_size", "max_tokens_per_step", "max_sequences", "context", "kv_cache_memory", "max_waiting", "max_chunk", "num_draft_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Every default is the recommended choice.

    Attributes:
        mode: "fast"; "exact" for float32 throughout and results that do not depend on the batch; "int8" (CPUs) for
            speed: activations are rounded to 8 bits, one scale for up to 128 columns, which costs 0.0003 nats a token of KL divergence on the
            reference model. Weights other than integers in groups are rounded again to 8 bits a row for it, activations then to 8 bits a token.
        lora: folders of LoRA adapters in PEFT's format by the names that requests choose them by.
        quantization: quantize an unquantized model while it loads, from its weights alone: "int8" (one scale a row), "fp8" (likewise, and inputs
            to FP8 a token), "w4" (groups of 128 or less), "nf4" (blocks of 64).
        device: "auto" takes a GPU where there is one.
        kv_cache_dtype: auto (FP8 where the checkpoint carries a scheme for it, else the model's), float32, bfloat16, float16, int8, fp8.
        kv_cache_memory: bytes for the cache; None for what the sequences can use, at most a quarter of the free memory (nine tenths on a GPU).
        block_size: tokens of a block.
        context: tokens of a sequence, at most the model's own; None for that.
        max_tokens_per_step, max_sequences, max_waiting: limits of the scheduler.
        max_chunk: tokens of one prompt in one step; None for no limit of its own.
        prefix_caching: keep computed prompts for later ones that begin alike.
        speculation: guess tokens ahead, to compute several in one step: "ngram" from the text so far, or the source of a smaller model with the
            same tokenizer; None for one token a step.
        num_draft_tokens: guesses of a sequence in one step at most; fewer while its guesses do not hold.
        seed: from which requests without a seed draw theirs; None for chance.
    """

    mode: Mode = "fast"
    quantization: str | None = None
    lora: Mapping[str, str] = field(default_factory=dict)
    device: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_cache_memory: int | None = None
    block_size: int = 16
    context: int | None = None
    max_tokens_per_step: int = 2048
    max_sequences: int = 128
    max_waiting: int | None = None
    max_chunk: int | None = None
    prefix_caching: bool = True
    speculation: str | None = None
    num_draft_tokens: int = 4
    seed: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UsageError(f"unknown mode {self.mode!r}; {did_you_mean(self.mode, get_args(Mode))}")
        if self.quantization is not None:
            require_known(self.quantization)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} is {value!r}; give a whole number of at least 1")
