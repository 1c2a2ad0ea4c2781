"""/v1/completions through the openai SDK: the engine's own tokens, texts and numbers, in OpenAI's shapes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from quantkit.runtime.llm import LLM
from tests.server.conftest import SMALL, Running

PROMPT = "Once upon a time"
GREEDY = {"model": "reference", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("reference", **SMALL)


def test_a_text_is_continued_as_llm_does(server: Running, llm: LLM) -> None:
    (expected,) = llm.generate(PROMPT, max_tokens=12, temperature=0)

    out = server.openai.completions.create(prompt=PROMPT, **GREEDY)

    assert (out.object, out.model, out.choices[0].finish_reason) == ("text_completion", "reference", "length")
    assert out.id.startswith("cmpl-") and out.choices[0].text == expected.text
    assert (out.usage.prompt_tokens, out.usage.completion_tokens, out.usage.total_tokens) == (5, 12, 17)


def test_a_stream_says_the_same_and_ends_with_the_usage(server: Running) -> None:
    whole = server.openai.completions.create(prompt=PROMPT, **GREEDY)

    chunks = list(server.openai.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY))

    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) == 13
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 11 + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stop_string_ends_the_text_before_it(server: Running) -> None:
    text = server.openai.completions.create(prompt=PROMPT, **GREEDY | {"max_tokens": 30}).choices[0].text
    stop = text[20:26]

    out = server.openai.completions.create(prompt=PROMPT, stop=[stop, "never said"], **GREEDY | {"max_tokens": 30})
    chunks = list(server.openai.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY | {"max_tokens": 30}))

    assert out.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == text[: text.index(stop)]
    assert out.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"


def test_many_prompts_of_ids_are_answered_in_their_order(server: Running, llm: LLM) -> None:
    prompts = [[5, 6, 7], [9], list(range(20, 60))]
    expected = llm.generate(prompts, max_tokens=6, n=2, seed=3, ignore_eos=True)

    out = server.openai.completions.create(model="reference", prompt=prompts, max_tokens=6, n=2, seed=3, extra_body={"ignore_eos": True})

    assert [choice.index for choice in out.choices] == list(range(6))
    assert [choice.text for choice in out.choices] == [c.text for output in expected for c in output.completions]
    assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (44, 36)


def test_several_continuations_stream_side_by_side(server: Running) -> None:
    settings = {"model": "reference", "prompt": [PROMPT, "Tom had"], "max_tokens": 6, "n": 2, "seed": 1}
    whole = server.openai.completions.create(**settings)

    texts = ["", "", "", ""]
    for chunk in server.openai.completions.create(stream=True, **settings):
        texts[chunk.choices[0].index] += chunk.choices[0].text

    assert texts == [choice.text for choice in whole.choices]


def test_echo_gives_every_log_probability_as_a_harness_reads_it(server: Running, llm: LLM) -> None:
    tokens = llm.engine.encode("Once upon a time there was a little girl")
    (expected,) = llm.generate([tokens], max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=1)

    out = server.openai.completions.create(prompt=[tokens], echo=True, logprobs=1, seed=1234, **GREEDY | {"max_tokens": 1})

    found, wanted = out.choices[0].logprobs, [*expected.prompt_logprobs[1:], *expected.completions[0].logprobs]
    assert len(found.tokens) == len(tokens) + 1 and found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == [each.logprob for each in wanted]
    assert [max(top.values()) for top in found.top_logprobs[1:]] == [each.top[0][1] for each in wanted]
    assert all(own in top.values() for own, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True))
    assert out.choices[0].text.startswith("Once upon a time there was a little girl")
    for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert out.choices[0].text[offset:].startswith(token)


def test_a_prompt_may_be_scored_alone(server: Running, llm: LLM) -> None:
    settings = GREEDY | {"prompt": PROMPT, "echo": True, "logprobs": 1}
    longer = server.openai.completions.create(**settings | {"max_tokens": 1}).choices[0]

    out = server.openai.completions.create(**settings | {"max_tokens": 0})

    assert out.choices[0].text == PROMPT and out.choices[0].finish_reason == "length" and out.usage.completion_tokens == 0
    assert out.choices[0].logprobs.token_logprobs == longer.logprobs.token_logprobs[:-1]
    streamed = [chunk.choices[0] for chunk in server.openai.completions.create(stream=True, **settings | {"max_tokens": 0})]
    assert "".join(chunk.text for chunk in streamed) == PROMPT


def test_an_echo_streams_whole(server: Running) -> None:
    settings = GREEDY | {"prompt": PROMPT, "echo": True, "logprobs": 0}
    whole = server.openai.completions.create(**settings).choices[0]

    chunks = [chunk.choices[0] for chunk in server.openai.completions.create(stream=True, **settings)]

    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [offset for chunk in chunks for offset in chunk.logprobs.text_offset] == whole.logprobs.text_offset
    assert [number for chunk in chunks for number in chunk.logprobs.token_logprobs] == whole.logprobs.token_logprobs


def test_requests_side_by_side_get_the_tokens_they_get_alone(server: Running) -> None:
    def ask(seed: int) -> str:
        settings = {"temperature": 1.0, "top_p": 0.9, "seed": seed, "max_tokens": 10 + seed}
        return server.openai.completions.create(model="reference", prompt=f"There were {seed} apples", **settings).choices[0].text

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(6)))

    assert together == alone and len(set(alone)) == 6


def test_sampling_of_other_servers_reaches_the_engine(server: Running, llm: LLM) -> None:
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 8, "stop_token_ids": [7]}
    common = {"max_tokens": 8, "temperature": 0.9, "seed": 4, "presence_penalty": 0.5}

    out = server.openai.completions.create(model="other/name", prompt=PROMPT, logit_bias={"300": -100}, extra_body=extra, **common)

    assert out.model == "other/name"
    assert out.choices[0].text == llm.generate(PROMPT, logit_bias={300: -100.0}, **common | extra)[0].text
