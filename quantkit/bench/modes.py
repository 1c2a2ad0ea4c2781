"""What a faster mode costs: the KL divergence of its logits from the exact mode's, over the same weights and the same text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from quantkit.evaluation.rows import default_text, rows_of_text
from quantkit.ops import Mode
from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class ModeCost:
    """A mode against the exact one.

    Attributes:
        kl: mean KL divergence in nats a token.
        same_top: share of tokens with the same most likely next token.
    """

    mode: Mode
    num_tokens: int
    kl: float
    same_top: float


def mode_costs(source: str, *, quantization: str | None, num_tokens: int) -> Iterator[ModeCost]:
    """Every other mode on about so many tokens of the reference model's held-out prose.

    Args:
        quantization: what an unquantized model is quantized to while it loads.
    """
    rows: list[list[int]] = []
    exact: list[Tensor] = []
    for mode in ("exact", *(mode for mode in get_args(Mode) if mode != "exact")):
        llm = LLM(source, mode=mode, quantization=quantization, max_sequences=1, prefix_caching=False, kv_cache_dtype="float32")
        if not rows:
            tokens = rows_of_text(default_text(), llm.engine.tokenizer, context=llm.engine.context, max_tokens=num_tokens)
            rows = tokens.input_ids.tolist()
        found = [_logprobs(llm, row) for row in rows]
        if mode == "exact":
            exact = found
            continue
        pairs = list(zip(exact, found, strict=True))
        count = sum(map(len, found))
        kl = sum(float((own.exp() * (own - other)).sum()) for own, other in pairs) / count
        same = sum(int((own.argmax(-1) == other.argmax(-1)).sum()) for own, other in pairs) / count
        yield ModeCost(mode, count, kl, same)


def _logprobs(llm: LLM, row: list[int]) -> Tensor:
    """Of every next token of a row, as the engine's own steps compute them: float64 [T - 1, V]."""
    seen: list[Tensor] = []
    decoder: Any = llm.engine.runner.decoder
    logits = decoder.logits

    def watched(*args: Tensor) -> Tensor:
        seen.append(logits(*args))
        return seen[-1]

    decoder.logits = watched
    try:
        llm.generate([row], SamplingParams(max_tokens=0, prompt_logprobs=0))
    finally:
        del decoder.logits
    return torch.cat(seen).double().log_softmax(-1)
