"""What an engine takes from the model's folder and the machine before the first request: tokenizer, context, end of text, size of the cache."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from quantkit import ops
from quantkit.errors import EngineError, SourceError, UsageError
from quantkit.models.experts import is_fused
from quantkit.models.tokenizer import load_tokenizer
from quantkit.runtime.decoders import Decoder
from quantkit.runtime.kv_cache import CacheLayout
from quantkit.runtime.kv_type import fixed_scales, kv_type
from quantkit.runtime.loader import LoadedModel, load
from quantkit.runtime.options import NGRAM, EngineOptions
from quantkit.runtime.rope import freeze
from quantkit.runtime.speculation import require_same_tokens

_log = logging.getLogger("quantkit")


def tokenizer_of(loaded: LoadedModel, options: EngineOptions) -> Any:
    """The model's tokenizer, or None where the folder has none: token ids still work.

    Raises:
        SourceError: it has more tokens than the model, added ones left out.
    """
    try:
        tokenizer = load_tokenizer(loaded.folder, trust_remote_code=options.trust_remote_code)
    except SourceError as error:
        _log.warning("%s; prompts must be token ids", error)
        return None
    if tokenizer.vocab_size > loaded.vocabulary:
        sizes = f"has {tokenizer.vocab_size:,} tokens and the model {loaded.vocabulary:,}"
        raise SourceError(f"the tokenizer of {loaded.name} {sizes}, so it is another model's; copy this model's own tokenizer files into the folder")
    return tokenizer


def context_of(loaded: LoadedModel, options: EngineOptions) -> int:
    if options.context is not None and options.context > loaded.context:
        raise UsageError(f"context is {options.context}, and {loaded.name} was made for {loaded.context} tokens; give at most that")
    return options.context or loaded.context


def end_of_text(loaded: LoadedModel, tokenizer: Any) -> frozenset[int]:
    """Every token that the model's files name as its end."""
    named = [_generation_config(loaded).get("eos_token_id"), getattr(loaded.config.get_text_config(), "eos_token_id", None)]
    named.append(getattr(tokenizer, "eos_token_id", None))
    tokens = [token for each in named if each is not None for token in (each if isinstance(each, list | tuple) else [each])]
    odd = next((token for token in tokens if type(token) is not int), None)
    if odd is not None:
        raise SourceError(f"{loaded.name} names {odd!r} as eos_token_id, which is no token id; mend config.json or generation_config.json")
    return frozenset(tokens)


def _generation_config(loaded: LoadedModel) -> dict[str, Any]:
    file = loaded.folder / "generation_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise SourceError(f"{file} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def layout_of(loaded: LoadedModel, decoder: Decoder, options: EngineOptions) -> CacheLayout:
    """The blocks of a model's cache; raises what `kv_type` raises."""
    own = torch.float32 if options.mode == "exact" else loaded.dtype
    dtype = kv_type(options.kv_cache_dtype, loaded.kv_scales, source=loaded.name, model_dtype=own)
    shapes = tuple(facts.shape for facts in decoder.layers)
    return CacheLayout(shapes, options.block_size, dtype, loaded.device, fixed_scales(dtype, loaded.kv_scales, shapes, loaded.device))


def warn_where_inexact(loaded: LoadedModel, layout: CacheLayout, options: EngineOptions) -> None:
    """Say where the exact mode's promise ends."""
    heads = int(getattr(loaded.config.get_text_config(), "num_attention_heads", layout.shapes[0].heads))
    sizes = {(shape.dim, layout.block_size, heads, shape.heads) for shape in layout.shapes}
    reasons = {why for size in sizes if (why := ops.why_not_native_attention(loaded.device, *size, layout.dtype))}
    if options.mode == "exact" and any(is_fused(module) for module in loaded.model.modules()):
        _log.warning("exact mode: fused experts multiply as many rows as are routed to each, so that last bits depend on the batch")
    if options.mode == "exact" and reasons:
        _log.warning("exact mode: attention runs on torch's operators (%s), whose last bits depend on the batch", "; ".join(sorted(reasons)))


def load_draft(target: LoadedModel, tokenizer: Any, options: EngineOptions) -> LoadedModel | None:
    """The model that guesses tokens ahead, where the options name one.

    Raises:
        UsageError: its tokens are not the target's.
    """
    if options.speculation in (None, NGRAM):
        return None
    draft = load(options.speculation, mode=options.mode, device=target.device, trust_remote_code=options.trust_remote_code)
    freeze(draft.model, draft.context)
    require_same_tokens(target, draft, (tokenizer, tokenizer_of(draft, options)))
    return draft


def num_blocks_of(options: EngineOptions, context: int, block_bytes: int, device: torch.device) -> int:
    """As many blocks as the sequences can use and the memory holds.

    Raises:
        EngineError: the memory holds not even one block.
    """
    useful = -(-context // options.block_size) * options.max_sequences
    memory = options.kv_cache_memory or _free_memory(device)
    count = min(useful, memory // block_bytes)
    if count < 1:
        wanted = f"no block of the KV cache, which takes {block_bytes:,}"
        raise EngineError(f"{memory:,} bytes of memory hold {wanted}; give more, or a smaller block_size")
    return count


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    return min(_available_memory(), _allowed_memory()) // 4


def _available_memory() -> int:
    """What the system could give, file caches included."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if found is None else found


def _allowed_memory() -> int:
    """What a container's limit leaves, where there is one."""
    group = Path("/sys/fs/cgroup")
    try:
        return max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit reads "max"
        return sys.maxsize
