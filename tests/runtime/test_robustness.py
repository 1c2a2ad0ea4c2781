"""What would give other tokens, or none, without a word: each was seen once."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.errors import EngineError, RequestError, SourceError, TooLongError
from quantkit.runtime.llm import LLM
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.sequence import Sequence
from tests.conversion.conftest import edit_config, save_tiny
from tests.runtime.conftest import greedy_by_transformers

EXACT = {"mode": "exact", "kv_cache_memory": 8 << 20}
LONG = [(7 * i) % 90 + 3 for i in range(100)]
LONGROPE = {
    "max_position_embeddings": 128, "original_max_position_embeddings": 32,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
                        "original_max_position_embeddings": 32},
}  # fmt: skip


def greedy(llm: LLM, prompts: list[list[int]], count: int = 8) -> list[list[int]]:
    return [out.completions[0].token_ids for out in llm.generate(prompts, max_tokens=count, temperature=0, ignore_eos=True)]


def test_long_rope_does_not_depend_on_the_batch_or_the_chunks(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", **LONGROPE)
    whole = greedy(LLM(str(folder), **EXACT), [LONG, LONG[:10]])

    assert whole == [greedy(LLM(str(folder), **EXACT), [prompt])[0] for prompt in (LONG, LONG[:10])]
    assert whole == greedy(LLM(str(folder), max_chunk=7, **EXACT), [LONG, LONG[:10]])
    (expected,) = greedy_by_transformers(folder)([LONG], 8)
    assert expected.allows(whole[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "message"),
    [("diffllama", "attends twice in one layer"), ("doge", "makes a mask of its own"), ("bert", "looks at later tokens")],
)
def test_attention_that_the_cache_does_not_hold_is_refused(family: str, message: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", family=family)

    with pytest.raises(SourceError, match=message):
        LLM(str(folder), **EXACT)


def test_a_tied_head_keeps_its_bias(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", family="phi", tie_word_embeddings=True)

    (expected,) = greedy_by_transformers(folder)([LONG[:9]], 8)

    assert expected.allows(greedy(LLM(str(folder), **EXACT), [LONG[:9]])[0])


def test_a_prompts_log_probabilities_are_whole_after_preemption(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    expected = LLM(str(folder), **EXACT).generate([LONG], scored)[0].prompt_logprobs
    llm = LLM(str(folder), mode="exact", max_tokens_per_step=6, kv_cache_memory=11 * 2 * 2 * 16 * 2 * 16 * 4)
    engine = llm.engine
    for i in (1, 2):
        engine.add(LONG[i : i + 12], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True), request_id=f"other {i}")
    for _ in range(3):
        engine.step()

    output = engine.add(LONG, scored, request_id="scored", priority=1)
    while engine.has_work:
        engine.step()

    assert engine.scheduler.num_preemptions > 0
    assert [e and e.token for e in output.prompt_logprobs] == [e and e.token for e in expected]
    torch.testing.assert_close(*(torch.tensor([e.logprob for e in each[1:]]) for each in (output.prompt_logprobs, expected)))


def test_engines_in_two_threads_keep_apart(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    engines = [LLM(str(folder), **EXACT) for _ in range(2)]
    expected = greedy(engines[0], [LONG[:20]], 30)
    found: dict[int, list[list[int]]] = {}

    def work(number: int) -> None:
        found[number] = [greedy(engines[number], [LONG[:20]], 30)[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {number: expected * 5 for number in range(2)}


def test_streams_side_by_side_are_whole(reference: Path) -> None:
    llm = LLM(str(reference), **EXACT)
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    alone = ["".join(llm.stream(prompt, **settings)) for prompt in ("Once upon a time", "Tom had")]
    streams = [llm.stream(prompt, **settings) for prompt in ("Once upon a time", "Tom had")]

    first = next(streams[0])
    second = "".join(streams[1])

    assert [first + "".join(streams[0]), second] == alone


def test_no_stop_string_ends_a_text_before_min_tokens(reference: Path) -> None:
    llm = LLM(str(reference), **EXACT)
    settings: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
    text = llm.generate("Once upon a time", **settings)[0].text
    early = text[4:9]

    (out,) = llm.generate("Once upon a time", stop=early, min_tokens=25, **settings)

    assert out.text.startswith(text[:20]) and len(out.completions[0].token_ids) >= 25


def test_a_bad_word_of_several_tokens_given_as_a_list_is_kept_out(reference: Path) -> None:
    llm = LLM(str(reference), **EXACT)
    tokens = llm.generate("Once upon a time", max_tokens=8, temperature=0)[0].completions[0].token_ids

    (out,) = llm.generate("Once upon a time", max_tokens=8, temperature=0, bad_words=[tokens[1:3]])

    assert out.completions[0].token_ids[:2] == tokens[:2] and out.completions[0].token_ids[2] != tokens[2]


def test_a_step_that_fails_leaves_other_requests_right(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(reference), **EXACT)
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "n": 3, "ignore_eos": True}
    expected = [c.token_ids for c in llm.generate([[5, 6, 7]], **settings)[0].completions]
    output = llm.engine.add([5, 6, 7], SamplingParams(**settings), request_id="a")
    llm.engine.step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "forward", lambda batch: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()

    assert [c.token_ids for c in output.completions] == expected


def test_a_stream_whose_logits_are_not_finite_says_so(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(reference), **EXACT)
    forward = llm.engine.runner.forward
    monkeypatch.setattr(llm.engine.runner, "forward", lambda batch: (forward(batch)[0] * torch.nan, forward(batch)[1]))

    with pytest.raises(EngineError, match="not finite"):
        list(llm.stream("Once", max_tokens=4))


def test_no_salt_reaches_an_adapters_prefixes() -> None:
    a, b = (Sequence("s", list(range(8)), SamplingParams(), salt=salt, lora=lora) for salt, lora in (("y", "x"), ("x\0y", "")))

    assert a.key_of(0, 4) != b.key_of(0, 4)


@pytest.mark.parametrize("settings", [{"top_k": 1.5}, {"max_tokens": 2.5}, {"logprobs": 1.5}, {"logit_bias": {"5": 1.0}}, {"stop_token_ids": {"x"}}])
def test_numbers_that_are_not_whole_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="whole number"):
        SamplingParams(**settings)


def test_exact_mode_says_where_it_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LLM(str(save_tiny(tmp_path / "m", head_dim=12)), **EXACT)

    assert "exact mode: attention runs on torch's operators (heads of 12 values" in caplog.text


@pytest.mark.parametrize("text", ["Tom says: the secret is 42 \ufffd", "Hello 🎉"])
def test_nothing_of_a_prompt_that_ends_in_a_broken_character_is_in_the_answer(text: str, reference: Path) -> None:
    llm = LLM(str(reference), **EXACT)
    prompt = llm.engine.encode(text)[: None if text.endswith("\ufffd") else -1]

    (out,) = llm.generate([prompt], max_tokens=6, temperature=0, ignore_eos=True)

    assert out.text == llm.engine.tokenizer.decode(out.completions[0].token_ids)


def test_texts_and_ids_far_beyond_the_context_are_refused_before_they_are_looked_at(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(str(reference), **EXACT)
    monkeypatch.setattr(llm.engine, "_check", lambda *_: pytest.fail("its ids were scanned"))
    monkeypatch.setattr(type(llm.engine.tokenizer), "__call__", lambda *_, **__: pytest.fail("it was tokenized"))

    with pytest.raises(TooLongError, match="a prompt of 5,000 tokens is more than the 1,024 that fit"):
        llm.generate([[5] * 5000], n=100)
    with pytest.raises(TooLongError, match="a text of 200,000 characters makes more tokens"):
        llm.generate("a" * 200_000)
    with pytest.raises(TooLongError, match="makes more tokens"):
        llm.chat([{"role": "user", "content": "a" * 200_000}])


def test_another_models_tokenizer_is_refused(reference: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(reference / name, folder / name)

    with pytest.raises(SourceError, match=r"the tokenizer of .* has 4,096 tokens and the model \d+, so it is another model's"):
        LLM(str(folder), **EXACT)


def test_an_end_of_text_that_is_no_token_is_refused_in_words(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')

    with pytest.raises(SourceError, match="'</s>' as eos_token_id"):
        LLM(str(folder), **EXACT)


def test_tensors_that_the_model_has_no_place_for_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = edit_config(save_tiny(tmp_path / "m"), num_hidden_layers=1)

    LLM(str(folder), **EXACT)

    assert "has no place for, which are not loaded: model.layers.1." in caplog.text


def test_exact_mode_says_that_experts_in_one_piece_depend_on_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LLM(str(save_tiny(tmp_path / "m", family="gpt_oss", num_local_experts=4, num_experts_per_tok=2)), **EXACT)

    assert "exact mode: fused experts" in caplog.text


def test_a_window_that_the_models_own_code_does_not_apply_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LLM(str(save_tiny(tmp_path / "m", family="olmoe", sliding_window=8, num_experts=4, num_experts_per_tok=2)), **EXACT)

    assert "names a window of 8 tokens that transformers' code for it does not apply" in caplog.text
