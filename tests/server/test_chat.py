"""/v1/chat/completions through the openai SDK."""

from __future__ import annotations

from quantkit.runtime.llm import LLM
from tests.server.conftest import SMALL, Running

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tom had 3 apples and ate one. How many are left?"}]
GREEDY = {"model": "reference", "messages": MESSAGES, "max_completion_tokens": 10, "temperature": 0}


def test_a_conversation_is_answered_as_llm_does(server: Running) -> None:
    llm = LLM("reference", **SMALL)
    expected = llm.chat(MESSAGES, max_tokens=10, temperature=0)

    out = server.openai.chat.completions.create(**GREEDY)

    assert (out.object, out.choices[0].message.role, out.choices[0].message.content) == ("chat.completion", "assistant", expected.text)
    assert out.id.startswith("chatcmpl-") and out.choices[0].finish_reason in ("stop", "length")
    assert (out.usage.prompt_tokens, out.usage.completion_tokens) == (len(expected.prompt_ids), len(expected.completions[0].token_ids))


def test_parts_of_text_are_one_text(server: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tom had 3 apples"}, {"type": "text", "text": "and ate one."}]}]
    plain = [{"role": "user", "content": "Tom had 3 apples\nand ate one."}]

    answers = [server.openai.chat.completions.create(**GREEDY | {"messages": messages}).choices[0].message.content for messages in (parts, plain)]

    assert answers[0] == answers[1]


def test_a_stream_opens_with_the_role_and_closes_with_the_reason(server: Running) -> None:
    settings = GREEDY | {"n": 2, "seed": 2, "temperature": 1.0}
    whole = server.openai.chat.completions.create(**settings)

    chunks = list(server.openai.chat.completions.create(stream=True, stream_options={"include_usage": True}, **settings))

    assert [choice.delta.role for choice in chunks[0].choices] == ["assistant"] * 2
    texts, reasons = ["", ""], [None, None]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_log_probabilities_come_with_bytes_and_the_most_likely_tokens(server: Running) -> None:
    entries = server.openai.chat.completions.create(logprobs=True, top_logprobs=3, **GREEDY).choices[0].logprobs.content

    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)


def test_without_a_limit_an_answer_may_fill_the_context(server: Running) -> None:
    messages = [{"role": "user", "content": "word " * 1000}]

    out = server.openai.chat.completions.create(model="reference", messages=messages, temperature=0, extra_body={"ignore_eos": True})

    assert out.usage.total_tokens == 1024 and out.choices[0].finish_reason == "length"


def test_the_raw_stream_is_server_sent_events(server: Running) -> None:
    with server.http.stream("POST", "/v1/chat/completions", json=GREEDY | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]

    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
