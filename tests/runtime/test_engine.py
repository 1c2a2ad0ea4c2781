"""The engine: transformers' own tokens from the weights a checkpoint stands for, and the same tokens whatever else runs and however it is cut up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.errors import RequestError, SourceError, UsageError
from quantkit.runtime.engine import Engine
from quantkit.runtime.llm import LLM
from quantkit.runtime.options import EngineOptions
from quantkit.runtime.sampling_params import SamplingParams
from tests.conversion.conftest import edit_config, edit_tensors, save_tiny
from tests.runtime.conftest import greedy_by_transformers

IS_FULL = bool(os.environ.get("QUANTKIT_FULL"))
NUM_PROMPTS, NUM_TOKENS = (64, 64) if IS_FULL else (12, 20)
SMALL = {"kv_cache_memory": 8 << 20}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 6}, "qwen2": {}, "qwen3": {}, "phi3": {}, "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 16}, "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {}, "phi": {}, "stablelm": {}, "cohere": {}, "olmo2": {}, "granite": {}, "starcoder2": {"sliding_window": 6},
    "phimoe": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "sarvam_moe": {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def engine(source: str | Path, **options: Any) -> LLM:
    return LLM(str(source), **{"mode": "exact"} | SMALL | options)


def greedy(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    return [out.completions[0].token_ids for out in llm.generate(prompts, max_tokens=count, temperature=0, ignore_eos=True)]


def expect(source: Path, prompts: list[list[int]], count: int, **options: Any) -> None:
    """Tokens of the engine are transformers'; near ties must be rare. QUANTKIT_FULL takes 64 prompts and 64 tokens everywhere."""
    count = NUM_TOKENS if IS_FULL else count
    expected = greedy_by_transformers(source)(prompts, count)
    found = greedy(engine(source, **options), prompts, count)
    assert all(e.allows(tokens) for e, tokens in zip(expected, found, strict=True))
    num_ties = sum(e.tokens != tokens for e, tokens in zip(expected, found, strict=True))
    print(f"{len(prompts)} prompts x {count} tokens: {num_ties} parted at a near tie")
    assert num_ties <= len(prompts) // 16


def test_the_reference_model_says_what_transformers_says(reference: Path, prompts: list[list[int]]) -> None:
    expect(reference, prompts[:NUM_PROMPTS], NUM_TOKENS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_transformers_says(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family=family, **FAMILIES[family])
    lengths = [1 + 29 * i % 60 for i in range(64)] if IS_FULL else [1, 5, 17, 30]
    some = [[(7 * i + 3 * row) % 90 + 3 for i in range(length)] for row, length in enumerate(lengths)]

    expect(folder, some, 12)


@pytest.fixture(scope="module")
def whole(reference: Path, prompts: list[list[int]]) -> list[list[int]]:
    return greedy(engine(reference), prompts[:NUM_PROMPTS], NUM_TOKENS)


CUTS: dict[str, dict[str, Any]] = {
    "one token a step": {"max_tokens_per_step": 1},
    "odd chunks": {"max_tokens_per_step": 23, "max_chunk": 7},
    "one sequence at a time": {"max_sequences": 1},
    "larger blocks": {"block_size": 32},
    "no prefix cache": {"prefix_caching": False},
    "a cache so small that sequences are preempted": {"kv_cache_memory": 6 * 2 * 16 * 2 * 64 * 4 * 12},
}


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_do_not_depend_on_how_the_work_is_cut_up(cut: str, reference: Path, prompts: list[list[int]], whole: list[list[int]]) -> None:
    llm = engine(reference, **CUTS[cut])

    assert greedy(llm, prompts[:NUM_PROMPTS], NUM_TOKENS) == whole
    if "preempted" in cut:
        assert llm.engine.scheduler.num_preemptions > 0
    llm.engine.scheduler.pool.check()
    assert llm.engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "laguna", "llama", "gpt_neox"])
def test_prompts_give_the_same_bits_alone_and_among_others(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {name: 8 for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    sizes["intermediate_size"] = 172  # no multiple of the vectors of any processor
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    llm = engine(save_tiny(tmp_path, family=family, **sizes, **(latent if family == "deepseek_v3" else {})))
    prompts = [[3 + (7 * i + 11 * row) % 90 for i in range(3 + 5 * row)] for row in range(6)]
    settings: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": 0}

    together = llm.generate(prompts, **settings)

    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = engine(tmp_path).generate([prompt], **settings)
        assert alone.prompt_logprobs == found.prompt_logprobs
        assert alone.completions[0].logprobs == found.completions[0].logprobs
    assert "fused experts" not in caplog.text


def test_tokens_do_not_depend_on_what_is_cached(reference: Path, prompts: list[list[int]], whole: list[list[int]]) -> None:
    llm = engine(reference, kv_cache_memory=64 << 20)
    first = greedy(llm, prompts[:NUM_PROMPTS], NUM_TOKENS)

    again = llm.generate(prompts[:NUM_PROMPTS], max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)

    assert first == [out.completions[0].token_ids for out in again] == whole
    assert sum(out.num_cached for out in again) > 0.6 * sum(map(len, prompts[:NUM_PROMPTS]))


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch(reference: Path, prompts: list[list[int]]) -> None:
    settings = {"max_tokens": 12, "temperature": 1.0, "top_p": 0.9, "seed": 5, "ignore_eos": True}
    alone = engine(reference).generate(prompts[3], **settings)[0].completions[0].token_ids

    among = engine(reference).generate(prompts[:8], **settings)[3].completions[0].token_ids

    assert alone == among
    assert engine(reference).generate(prompts[3], **settings | {"seed": 6})[0].completions[0].token_ids != alone


def test_several_continuations_differ_and_share_the_prompt(reference: Path, prompts: list[list[int]]) -> None:
    llm = engine(reference)

    (out,) = llm.generate(prompts[5], n=3, max_tokens=10, temperature=1.0, seed=1, ignore_eos=True)

    texts = {tuple(c.token_ids) for c in out.completions}
    assert len(texts) == 3 and all(len(c.token_ids) == 10 for c in out.completions)
    assert (
        llm.generate(prompts[5], max_tokens=10, temperature=1.0, seed=1, ignore_eos=True)[0].completions[0].token_ids == out.completions[0].token_ids
    )


def test_log_probabilities_of_prompt_and_answer_are_transformers(reference: Path, prompts: list[list[int]]) -> None:
    from transformers import AutoModelForCausalLM

    (out,) = engine(reference, max_chunk=9).generate(prompts[2], max_tokens=5, temperature=0, logprobs=2, prompt_logprobs=1, ignore_eos=True)

    tokens = prompts[2] + out.completions[0].token_ids
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    found = [each.logprob for each in (*out.prompt_logprobs[1:], *out.completions[0].logprobs)]
    assert out.prompt_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)
    assert [len(each.top) for each in out.completions[0].logprobs] == [2] * 5


@pytest.mark.parametrize("cut", [{}, {"max_chunk": 9}, {"max_tokens_per_step": 1}], ids=str)
def test_a_prompt_may_be_scored_alone_and_be_one_longer_than_the_context(cut: dict[str, int], reference: Path, prompts: list[list[int]]) -> None:
    prompt = max(prompts, key=len)
    (whole,) = engine(reference).generate(prompt, max_tokens=1, prompt_logprobs=1, temperature=0)
    llm = engine(reference, context=len(prompt) - 1, **cut)

    for first in (1, 60, 60, len(prompt), 9999):
        (out,) = llm.generate(prompt, max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=first)
        assert out.prompt_logprobs == [None] * min(first, len(prompt)) + whole.prompt_logprobs[first:]
        assert out.completions[0].token_ids == [] and out.completions[0].finish_reason == "length"
    llm.engine.scheduler.pool.check()
    assert llm.engine.scheduler.pool.num_used == 0 and not llm.engine.has_work
    with pytest.raises(RequestError, match="give at least two"):
        llm.generate([5], max_tokens=0, prompt_logprobs=0)
    with pytest.raises(RequestError, match="max_tokens is 0"):
        llm.generate([5, 6], max_tokens=0)
    with pytest.raises(RequestError, match="more than the 89 that fit"):
        llm.generate([5] * (len(prompt) + 1), max_tokens=0, prompt_logprobs=0)


@pytest.mark.parametrize("cut", [{}, {"max_chunk": 9}, {"max_tokens_per_step": 5}], ids=str)
def test_log_probabilities_of_a_prompts_end_come_with_its_beginning_from_the_cache(
    cut: dict[str, int], reference: Path, prompts: list[list[int]]
) -> None:
    prompt, settings = max(prompts, key=len), {"max_tokens": 2, "temperature": 0, "ignore_eos": True, "prompt_logprobs": 1}
    (whole,) = engine(reference).generate(prompt, **settings)
    llm = engine(reference, **cut)

    for first, cached in ((60, 0), (60, 48), (50, 48), (len(prompt), len(prompt) - 1), (9999, len(prompt) - 1)):
        (out,) = llm.generate(prompt, prompt_logprobs_from=first, **settings)

        assert out.prompt_logprobs == [None] * min(first, len(prompt)) + whole.prompt_logprobs[first:]
        assert out.num_cached == cached // 16 * 16
        assert out.completions[0].token_ids == whole.completions[0].token_ids


def test_text_ends_before_a_stop_string_and_none_of_it_is_shown(reference: Path) -> None:
    llm = engine(reference)
    settings = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    text = llm.generate("Once upon a time", **settings)[0].text
    stop = text[20:26]

    pieces = list(llm.stream("Once upon a time", stop=stop, **settings))
    (out,) = llm.generate("Once upon a time", stop=[stop, "never said"], **settings)

    assert "".join(pieces) == out.text == text[: text.index(stop)]
    assert (out.completions[0].finish_reason, out.completions[0].stop_reason) == ("stop", stop)


def test_text_in_pieces_is_the_text(reference: Path) -> None:
    llm = engine(reference)
    settings = {"max_tokens": 30, "temperature": 1.5, "seed": 3, "ignore_eos": True}

    assert "".join(llm.stream("Tom had 3 apples", **settings)) == llm.generate("Tom had 3 apples", **settings)[0].text


def test_leaving_a_stream_gives_its_blocks_back(reference: Path) -> None:
    llm = engine(reference)
    stream = llm.stream("Once upon a time", max_tokens=100)
    next(stream)

    stream.close()

    assert llm.engine.scheduler.pool.num_used == 0 and not llm.engine.has_work


def test_logits_that_are_not_finite_fail_that_request_and_no_other(
    reference: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(reference)
    forward = llm.engine.runner.forward

    def poisoned(batch: Any) -> Any:
        logits, wanted = forward(batch)
        for each in wanted:
            if each.piece.sequence.tokens[:3] == prompts[1][:3]:
                logits = logits.clone()
                logits[each.rows] = torch.nan
        return logits, wanted

    monkeypatch.setattr(llm.engine.runner, "forward", poisoned)
    good, bad = llm.generate(prompts[:2], max_tokens=6, temperature=0, ignore_eos=True)

    assert bad.completions[0].finish_reason == "error" and "not finite" in str(bad.completions[0].error)
    assert len(good.completions[0].token_ids) == 6
    assert llm.engine.stats.num_not_finite == 1 and llm.engine.scheduler.pool.num_used == 0


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "fp8", "int8"])
def test_a_smaller_cache_costs_little(kind: str, reference: Path, prompts: list[list[int]]) -> None:
    settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    exact, near = (engine(reference, kv_cache_dtype=k).generate(prompts[:6], **settings) for k in ("float32", kind))

    pairs = [
        (a.logprob, b.logprob) for x, y in zip(exact, near, strict=True) for a, b in zip(x.prompt_logprobs[1:], y.prompt_logprobs[1:], strict=True)
    ]
    a, b = torch.tensor(pairs).T
    assert (a - b).abs().mean() < {"fp8": 0.05, "int8": 0.02}.get(kind, 0.01)
    assert not torch.equal(a, b)


def test_the_fast_mode_is_near_the_exact_one(reference: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    convert(str(reference), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn"))
    settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}

    exact, fast = (engine(tmp_path / "out", mode=mode).generate(prompts[:6], **settings) for mode in ("exact", "fast"))

    pairs = [
        (a.logprob, b.logprob) for x, y in zip(exact, fast, strict=True) for a, b in zip(x.prompt_logprobs[1:], y.prompt_logprobs[1:], strict=True)
    ]
    a, b = torch.tensor(pairs).T
    assert (a - b).abs().mean() < 0.05


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": ([], {}, "the prompt is empty"),
    "id out of range": ([1, 4096], {}, "the prompt holds token 4096; ids go from 0 to 4095"),
    "too long": ([5] * 1020, {"max_tokens": 10}, "more than the context of 1024"),
    "temperature": ([5], {"temperature": -1.0}, "temperature is -1.0; give a number of at least 0"),
    "top_p": ([5], {"top_p": 0.0}, "top_p is 0.0; give a number of above 0"),
    "n": ([5], {"n": 1000}, "n is 1000"),
    "bias": ([5], {"logit_bias": {9999: 1.0}}, "logit_bias holds token 9999"),
    "min above max": ([5], {"min_tokens": 20, "max_tokens": 10}, "min_tokens is 20"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused_in_words_and_the_engine_goes_on(case: str, reference: Path) -> None:
    prompt, settings, message = REFUSED[case]
    llm = engine(reference)

    with pytest.raises(RequestError, match=message):
        llm.generate([[5, 6], prompt], **settings)

    assert not llm.engine.has_work
    assert len(greedy(llm, [[5, 6]], 3)[0]) == 3


def test_options_that_cannot_be_are_refused(reference: Path) -> None:
    for settings, message in (({"context": 9999}, "made for 1024"), ({"mode": "fats"}, "did you mean 'fast'"), ({"kv_cache_dtype": "int4"}, "int8"),
                              ({"blocksize": 3}, "did you mean 'block_size'"), ({"block_size": 0}, "block_size is 0")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            LLM(str(reference), **settings)


def test_a_checkpoint_that_lacks_a_tensor_or_has_another_shape_is_refused(tmp_path: Path) -> None:
    lacking = edit_tensors(save_tiny(tmp_path / "a"), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(SourceError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight \[128, 64\]"):
        engine(lacking)
    other = edit_config(save_tiny(tmp_path / "b"), intermediate_size=96)
    with pytest.raises(SourceError, match=r"is \[128, 64\] in the checkpoint; the config's model wants \[96, 64\]"):
        engine(other)


def test_what_cannot_be_paged_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "mamba", family="mamba", state_size=8)

    with pytest.raises(SourceError, match="mamba with layers of linear_attention; the runtime runs full and sliding attention"):
        Engine(str(folder), EngineOptions())


def test_a_model_without_a_tokenizer_takes_ids_and_says_so(tmp_path: Path) -> None:
    llm = engine(save_tiny(tmp_path / "bare"))

    assert len(greedy(llm, [[5, 6, 7]], 4)[0]) == 4
    with pytest.raises(RequestError, match="has no tokenizer, so prompts must be token ids"):
        llm.generate("text")
    with pytest.raises(RequestError, match="stop strings cannot be found"):
        llm.generate([5], SamplingParams(stop=("x",)))
