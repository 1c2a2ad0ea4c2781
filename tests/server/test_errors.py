"""What cannot be served is refused in OpenAI's form, naming the field, and the server goes on."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import Running, running

REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "n": ({"n": 1000000}, "n", "less than or equal to 128"),
    "temperature": ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    "top_p": ({"top_p": 0}, "top_p", "greater than 0"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "a word for a number": ({"max_tokens": "many"}, "max_tokens", "valid integer"),
    "too long": ({"max_tokens": 5000}, None, "more than the context of 1024"),
    "logprobs": ({"logprobs": 5000}, "logprobs", "less than or equal to 100"),
    "best_of": ({"best_of": 4}, "best_of", "best_of is 4 and n is 1"),
    "stops": ({"stop": ["x"] * 100}, "stop", "at most 32"),
    "empty stop": ({"stop": ""}, "stop.0", "at least 1"),
    "bias of no token": ({"logit_bias": {"99999": 1}}, None, "logit_bias holds token 99999"),
    "bias too large": ({"logit_bias": {"5": 1000}}, "logit_bias.5", "less than or equal to 100"),
    "no prompt": ({"prompt": None}, "prompt", "give a string"),
    "mixed prompts": ({"prompt": ["a", [1]]}, "prompt", "give a string"),
    "id out of range": ({"prompt": [-1]}, None, "ids go from 0 to 4095"),
    "too many prompts": ({"prompt": ["a"] * 2000}, "prompt", "more than 1024"),
    "too many continuations": ({"prompt": ["a"] * 500, "n": 3}, "n", "more than 1024 continuations"),
    "more than run at once": ({"n": 128, "prompt": "a"}, None, "sequences run at once"),
    "half a character": ({"prompt": "a\ud800"}, "prompt", "half of a surrogate pair"),
    "not yet": ({"guided_json": {"type": "object"}}, "guided_json", "not supported yet"),
    "suffix": ({"suffix": "the end"}, "suffix", "not supported yet"),
    "misspelt": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "half a field": ({"a\ud800": 1}, None, "the body: "),
    "options without a stream": ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
    "min above max": ({"min_tokens": 20, "max_tokens": 10}, None, "min_tokens is 20"),
}  # fmt: skip


@pytest.fixture(scope="module")
def narrow() -> Any:
    with running(max_sequences=100) as it:
        yield it


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_completion_is_refused_by_name(case: str, narrow: Running) -> None:
    fields, param, message = REFUSED[case]

    response = narrow.http.post("/v1/completions", content=_ascii({"prompt": "a"} | fields), headers={"content-type": "application/json"})

    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert message in error["message"] and _unindexed(error["param"]) == param
    assert not narrow.engine.has_work and narrow.http.get("/health").status_code == 200


CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"messages": []}, "messages: List should have at least 1 item"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type 'image_url' are not supported yet"),
    "role": ({"messages": [{"role": "clown", "content": "a"}]}, "'system', 'developer', 'user' or 'assistant'"),
    "no content": ({"messages": [{"role": "user"}]}, "content: Field required"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported yet"),
    "tool calls": ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "'tool_calls' are not supported yet"),
    "top without logprobs": ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHATS)
def test_a_bad_chat_is_refused_and_the_sdk_says_why(case: str, server: Running) -> None:
    fields, message = CHATS[case]

    with pytest.raises(openai.BadRequestError) as raised:
        server.openai.chat.completions.create(**{"model": "reference", "messages": [{"role": "user", "content": "a"}]} | fields)

    assert message in raised.value.message


def test_harmless_fields_are_taken(server: Running) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "tools": [], "response_format": {"type": "text"}, "suffix": None}

    assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1} | harmless).status_code == 200


def test_an_unknown_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'reference'"):
        server.openai.completions.create(model="refrence", prompt="a")
    assert [model.id for model in server.openai.models.list()] == ["reference", "other/name"]
    assert server.openai.models.retrieve("other/name").id == "other/name"


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/v1/embeddings", 404), ("GET", "/v1/completions", 405), ("GET", "/", 404)])
def test_what_is_not_there_is_answered_with_what_is(method: str, path: str, status: int, server: Running) -> None:
    response = server.http.request(method, path)

    assert response.status_code == status
    assert "/v1/chat/completions" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b"", b"\xff", b'{"prompt": ' + b"[" * 100000, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_request_is_refused(body: bytes, server: Running) -> None:
    response = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})

    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_body_of_another_type_says_what_curl_needs(server: Running) -> None:
    response = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "application/x-www-form-urlencoded"})

    assert response.status_code == 400 and "application/json" in response.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: Running) -> None:
    response = server.http.post("/v1/completions", content=b" " * (33 << 20), headers={"content-type": "application/json"})

    assert response.status_code == 413 and "33,554,432 bytes" in response.json()["error"]["message"]


def _ascii(body: dict[str, Any]) -> bytes:
    import json

    return json.dumps(body).encode()


def _unindexed(param: str | None) -> str | None:
    """The fields of prompts are numbered by form and place; the name is what counts."""
    return "prompt" if param and param.startswith("prompt") else param
