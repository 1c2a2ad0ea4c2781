"""transformers' own generate, one request after another, as a script would call it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from quantkit.bench.engine import Throughput


def throughput(folder: Path, prompts: list[list[int]], num_output: int, *, dtype: torch.dtype, num_timed: int = 2) -> Throughput:
    """Some of the prompts are timed and the rest counted as equal, as each takes as long as any other."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    settings = {"max_new_tokens": num_output, "min_new_tokens": num_output, "do_sample": False, "pad_token_id": 0}
    model.generate(torch.tensor([prompts[0][:8]]), attention_mask=torch.ones(1, 8), **settings | {"max_new_tokens": 2, "min_new_tokens": 2})
    started = time.perf_counter()
    for prompt in prompts[:num_timed]:
        model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
    seconds = (time.perf_counter() - started) * len(prompts) / min(num_timed, len(prompts))
    return Throughput(len(prompts), len(prompts[0]), num_output, seconds)
