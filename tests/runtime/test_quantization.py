"""Quantizing while loading: the model that a conversion without data makes, and a refusal where there is nothing to quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from quantkit_kernels.cpu import low_bit_linear

from quantkit.cli.main import cli
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.core.divergence import Divergence
from quantkit.errors import UsageError
from quantkit.models.device import find_device
from quantkit.runtime.llm import LLM
from quantkit.runtime.loader import load
from tests.conversion.conftest import save_tiny

RECIPES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "w4": ("w4a16-mse", (), "compressed-tensors"), "int8": ("w4a16-rtn", (".*=w8a16-channel",), "compressed-tensors"),
    "fp8": ("fp8-dynamic", (), "compressed-tensors"), "nf4": ("nf4", (), "bitsandbytes"),
}  # fmt: skip
MOST_LOST = {"w4": 0.05, "int8": 0.002, "fp8": 0.01, "nf4": 0.05}
"""Nats a token of KL divergence on the reference model."""


def tokens(source: Path, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    outputs = LLM(str(source), mode="exact", kv_cache_memory=8 << 20, **options).generate(prompts, max_tokens=12, temperature=0, ignore_eos=True)
    return [out.completions[0].token_ids for out in outputs]


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_quantized_at_load_says_what_the_converted_one_says(name: str, reference: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    recipe, overrides, container = RECIPES[name]
    convert(str(reference), tmp_path / "out", ConvertOptions(recipe=recipe, overrides=overrides, format=container))

    assert tokens(reference, prompts[:8], quantization=name) == tokens(tmp_path / "out", prompts[:8])


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "qwen3_moe": {"hidden_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gemma2": {"hidden_size": 64},
}


@pytest.mark.parametrize("family", SIZES)
def test_transposed_expert_and_odd_layers_are_held_as_a_conversion_stores_them(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family=family, **SIZES[family])
    container = "gptq" if family == "gpt2" else "compressed-tensors"
    convert(str(folder), tmp_path / "out", ConvertOptions(recipe="w4a16-mse", format=container))
    cpu = find_device("cpu")

    at_load, converted = (load(str(s), mode="exact", device=cpu, quantization=q) for s, q in ((folder, "w4"), (tmp_path / "out", None)))

    assert at_load.schemes == converted.schemes
    for each in (at_load, converted):
        each.model.set_attn_implementation("eager")
    ids = torch.arange(24)[None]
    assert torch.equal(at_load.model(input_ids=ids).logits, converted.model(input_ids=ids).logits)


def test_a_quantized_checkpoint_is_not_quantized_again(peers: Path) -> None:
    with pytest.raises(UsageError, match=r"is quantized already \(w4a16\); leave --quantization w4 out"):
        LLM(str(peers / "ct_w4a16_gptq"), quantization="w4")


@pytest.mark.parametrize("name", RECIPES)
def test_quantizing_at_load_costs_little(name: str, reference: Path, prompts: list[list[int]]) -> None:
    cpu, divergence = find_device("cpu"), Divergence()
    models = [load(str(reference), mode="exact", device=cpu, quantization=each).model for each in (None, name)]
    for model in models:
        model.set_attn_implementation("eager")

    for prompt in prompts[:16]:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            before, after = (model(input_ids=ids).logits[0, :-1] for model in models)
        divergence.add(before, after, ids[0, 1:], torch.ones(len(prompt) - 1, dtype=torch.bool))

    assert 0 < divergence.result().kl_mean < MOST_LOST[name]


@pytest.mark.parametrize(("name", "others"), [("fp4", "did you mean 'nf4' or 'fp8'"), ("gguf", "known: fp8, int8, nf4, w4")])
def test_quantizations_that_do_not_exist_are_answered_with_those_that_do(name: str, others: str) -> None:
    result = CliRunner().invoke(cli, ["generate", "reference", "--prompt", "x", "--quantization", name])

    assert isinstance(result.exception, UsageError)
    assert f"unknown quantization {name!r}" in str(result.exception) and others in str(result.exception)


def logprobs(reference: Path, prompts: list[list[int]], mode: str) -> torch.Tensor:
    llm = LLM(str(reference), mode=mode, quantization="w4", kv_cache_memory=8 << 20)
    made = llm.generate(prompts[:8], max_tokens=1, prompt_logprobs=0, temperature=0)
    return torch.tensor([each.logprob for out in made for each in out.prompt_logprobs[1:]])


def test_int8_mode_says_nearly_what_the_weights_say_with_and_without_a_native_kernel(
    reference: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, int8 = (logprobs(reference, prompts, mode) for mode in ("exact", "int8"))
    monkeypatch.setattr(low_bit_linear, "library", lambda name: None)
    by_reference, by_rows = (logprobs(reference, prompts, mode) for mode in ("exact", "int8"))

    assert (by_reference - exact).abs().max() < 1e-4
    assert 0 < (int8 - exact).abs().mean() < 0.02 and 0 < (by_rows - exact).abs().mean() < 0.05
