"""What a mode costs is what its logits, computed elsewhere, say."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from quantkit.bench.modes import mode_costs
from quantkit.checkpoint.source import resolve
from quantkit.evaluation.rows import default_text, rows_of_text
from quantkit.models.tokenizer import load_tokenizer


def test_costs_of_modes_come_from_the_engines_logits() -> None:
    fast, int8 = mode_costs("reference", quantization="w4", num_tokens=600)

    assert (fast.mode, int8.mode) == ("fast", "int8")
    assert 0 < fast.kl < 0.001 < 1000 * fast.kl and fast.kl < int8.kl < 0.01
    assert fast.num_tokens == int8.num_tokens >= 600


def test_a_mode_of_the_same_arithmetic_costs_what_bfloat16_costs() -> None:
    """Unquantized weights in fast mode are multiplied in bfloat16 or float32, as transformers multiplies them."""
    reference = resolve("reference").folder
    ids = rows_of_text(default_text(), load_tokenizer(reference), context=1024, max_tokens=600).input_ids
    logprobs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=dtype).eval()
        with torch.no_grad():
            logprobs[dtype] = model(ids).logits[:, :-1].double().log_softmax(-1)
    own, other = logprobs.values()
    expected = float((own.exp() * (own - other)).sum(-1).mean())

    fast, _ = mode_costs("reference", quantization=None, num_tokens=600)

    assert fast.kl < 2 * expected
