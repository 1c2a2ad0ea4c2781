"""What a mode costs is what its logits, computed elsewhere, say."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantkit import ops
from quantkit.bench import modes
from quantkit.bench.modes import mode_costs
from quantkit.checkpoint.source import resolve
from quantkit.core.divergence import Divergence
from quantkit.evaluation.rows import default_text, rows_of_text
from quantkit.models.tokenizer import load_tokenizer


def test_int8_costs_more_than_fast() -> None:
    (first, fast), (second, int8) = mode_costs("reference", quantization="w4", num_tokens=600)

    assert (first, second) == ("fast", "int8")
    assert 0 < fast.kl_mean < int8.kl_mean < 0.01
    assert fast.num_tokens == int8.num_tokens >= 600


def test_the_exact_mode_is_what_transformers_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the fast mode's logits, those of another model: the divergence is that of transformers' two models."""
    reference = resolve("reference").folder
    rows = rows_of_text(default_text(), load_tokenizer(reference), context=1024, max_tokens=600)
    models = [AutoModelForCausalLM.from_pretrained(reference, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)]
    expected = Divergence()
    with torch.no_grad():
        expected.add(*(model(rows.input_ids).logits for model in models), rows.targets, rows.counted)
    own = modes._logits

    @torch.no_grad()
    def other(llm: object, row: torch.Tensor) -> torch.Tensor:
        return own(llm, row) if llm.engine.options.mode == "exact" else models[1](row[None]).logits[0, :-1].float()

    monkeypatch.setattr(modes, "_logits", other)
    (_, fast), _ = mode_costs("reference", quantization=None, num_tokens=600)

    assert fast.kl_mean == pytest.approx(expected.result().kl_mean, rel=0.02)


def test_modes_that_the_machine_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.int8_activations, "why_not", lambda: "not here")

    assert [mode for mode, _ in mode_costs("reference", quantization=None, num_tokens=100)] == ["fast"]
