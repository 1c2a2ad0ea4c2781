"""Who runs on the decoder of our own: models built like Llama, proved by their logits; and nobody who only looks so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.runtime.decoders.decoder import ModelingCode
from quantkit.runtime.decoders.lean import LeanDecoder
from quantkit.runtime.llm import LLM
from tests.conversion.conftest import save_tiny
from tests.runtime.conftest import greedy_by_transformers
from tests.runtime.test_engine import FAMILIES, engine, greedy

LEAN = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"]
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
SOME = [[(7 * i + 3 * row) % 90 + 3 for i in range(length)] for row, length in enumerate((1, 5, 17, 30))]


def decoder_of(llm: LLM) -> object:
    return llm.engine.runner.decoder


@pytest.mark.parametrize("family", LEAN)
def test_models_built_like_llama_run_lean_in_both_modes(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family=family, **FAMILIES[family])

    for mode in ("exact", "fast"):
        assert isinstance(decoder_of(engine(folder, mode=mode)), LeanDecoder)


UNLIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "residuals that are scaled": ("granite", {"residual_multiplier": 0.5}),
    "an embedding that is scaled": ("granite", {"embedding_multiplier": 3.0}),
    "logits that are scaled": ("granite", {"logits_scaling": 2.0}),
    "layers without positions": ("smollm3", {"no_rope_layers": [0, 1]}),
    "norms behind alone": ("olmo2", {}),
    "no rotary positions": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "sinks in the softmax": (
        "gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2, "head_dim": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_models_that_only_look_like_llama_run_their_own_code_and_say_why(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family, settings = UNLIKE[case]
    caplog.set_level("INFO", logger="quantkit")

    llm = engine(save_tiny(tmp_path / family, family=family, **settings))

    assert isinstance(decoder_of(llm), ModelingCode)
    assert "runs through transformers' own code" in caplog.text


@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotary_positions_say_what_transformers_says(rope: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / rope, rope_parameters=ROPES[rope] | {"rope_theta": 10000.0}, max_position_embeddings=128)
    llm = engine(folder)

    assert isinstance(decoder_of(llm), LeanDecoder)
    for expected, found in zip(greedy_by_transformers(folder)(SOME, 12), greedy(llm, SOME, 12), strict=True):
        assert expected.allows(found)


def test_both_decoders_give_the_same_logits(reference: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    lean = engine(reference)
    monkeypatch.setattr(LeanDecoder, "of", classmethod(lambda cls, *_: "asked not to"))
    own = engine(reference)

    assert (type(decoder_of(lean)), type(decoder_of(own))) == (LeanDecoder, ModelingCode)
    pairs = [[[each.logprob for each in out.prompt_logprobs[1:]] for out in llm.generate(prompts[:4], **settings)] for llm in (lean, own)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-4, rtol=0)
