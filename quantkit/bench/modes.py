"""What a faster mode costs: the KL divergence of its logits from the exact mode's, over the same weights and the same text."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from quantkit import ops
from quantkit.core.divergence import Divergence, DivergenceResult
from quantkit.errors import UsageError
from quantkit.evaluation.rows import default_text, rows_of_text
from quantkit.ops import Mode
from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams


def mode_costs(source: str, *, quantization: str | None, num_tokens: int) -> Iterator[tuple[Mode, DivergenceResult]]:
    """Every other mode that this machine has, on about so many tokens of the reference model's held-out prose. Two models are in memory at once.

    Args:
        quantization: what an unquantized model is quantized to while it loads.
    """
    settings: dict[str, Any] = {"quantization": quantization, "max_sequences": 1, "prefix_caching": False, "kv_cache_dtype": "float32"}
    exact = LLM(source, mode="exact", **settings)
    rows = rows_of_text(default_text(), exact.engine.tokenizer, context=exact.engine.context, max_tokens=num_tokens)
    for mode in get_args(Mode):
        if mode == "exact" or not _is_here(mode, exact.engine.loaded.device):
            continue
        llm, divergence = LLM(source, mode=mode, **settings), Divergence()
        for ids, targets, counted in zip(rows.input_ids, rows.targets, rows.counted, strict=True):
            divergence.add(_logits(exact, ids), _logits(llm, ids), targets[:-1], counted[:-1])
        yield mode, divergence.result()
        del llm
        gc.collect()


def _is_here(mode: Mode, device: torch.device) -> bool:
    try:
        ops.require_mode(mode, device)
    except UsageError:
        return False
    return True


def _logits(llm: LLM, row: Tensor) -> Tensor:
    """Of every next token of a row, as the engine's own steps compute them: float32 [T - 1, V]."""
    seen: list[Tensor] = []
    forward = llm.engine.runner.forward

    def watched(batch: Any) -> Any:
        logits, wanted = forward(batch)
        seen.append(logits)
        return logits, wanted

    llm.engine.runner.forward = watched  # type: ignore[method-assign]
    try:
        llm.generate([row.tolist()], SamplingParams(max_tokens=0, prompt_logprobs=0))
    finally:
        llm.engine.runner.forward = forward  # type: ignore[method-assign]
    return torch.cat(seen)
