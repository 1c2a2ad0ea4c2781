"""The form of answers through the openai SDK: what comes has it, what cannot be had is refused by its field, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from quantkit.runtime.matcher import Compiler
from quantkit.runtime.structure import MAX_LENGTH, Structure
from tests.server.conftest import SECONDS, Running, until

MESSAGES = [{"role": "user", "content": "Tell me about Tom."}]
CHAT = {"model": "reference", "messages": MESSAGES, "max_tokens": 200, "temperature": 1.2, "seed": 3}
TEXT = {"model": "reference", "prompt": "Tell me about Tom: ", "max_tokens": 200, "temperature": 1.2, "seed": 3}
PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "pets"],
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "maxItems": 3, "items": {"enum": ["cat", "dog"]}},
    },
}  # fmt: skip


class Person(BaseModel):
    name: Annotated[str, Field(max_length=8)]
    age: Annotated[int, Field(ge=0, le=120)]
    is_happy: bool


def named(schema: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema} | others}


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_chat_answers_in_its_schema(strict: bool | None, server: Running) -> None:
    out = server.openai.chat.completions.create(response_format=named(PERSON, strict=strict), n=4, **CHAT)

    assert [choice.finish_reason for choice in out.choices] == ["stop"] * 4
    for choice in out.choices:
        jsonschema.validate(json.loads(choice.message.content), PERSON)


def test_the_sdk_parses_what_it_asked_for(server: Running) -> None:
    out = server.openai.chat.completions.parse(response_format=Person, **CHAT)

    assert isinstance(out.choices[0].message.parsed, Person)


def test_a_stream_has_the_form_too(server: Running) -> None:
    chunks = list(server.openai.chat.completions.create(response_format=named(PERSON), stream=True, **CHAT))

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), PERSON)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_any_object_is_an_object(server: Running) -> None:
    settings = CHAT | {"max_tokens": 40}
    for extra in ({"response_format": {"type": "json_object"}}, {"extra_body": {"structured_outputs": {"json_object": True}}}):
        out = server.openai.chat.completions.create(n=4, **settings | extra)

        for choice in out.choices:
            assert choice.message.content.lstrip().startswith("{")
            assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_completions_take_a_response_format_for_every_prompt(server: Running) -> None:
    prompts = ["Tell me about Tom: ", "Tell me about Ann: "]

    out = server.openai.completions.create(**TEXT | {"prompt": prompts, "n": 2, "extra_body": {"response_format": named(PERSON)}})

    assert len(out.choices) == 4
    for choice in out.choices:
        jsonschema.validate(json.loads(choice.text), PERSON)


SUM = 'start: NUMBER "+" NUMBER\nNUMBER: /[1-9][0-9]{0,3}/'
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "regex": ({"regex": r"\d{4}-\d{2}"}, r"\d{4}-\d{2}"),
    "choice": ({"choice": ["red", "green"]}, "red|green"),
    "grammar": ({"grammar": SUM}, r"[1-9]\d{0,3}\+[1-9]\d{0,3}"),
    "json": ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, r"\d\d"),
    "json as text": ({"json": '{"type": "integer", "minimum": 10, "maximum": 99}'}, r"\d\d"),
    "with what vLLM's clients leave out": ({"regex": "[ab]{3}", "json": None, "json_object": False, "whitespace_pattern": None}, "[ab]{3}"),
}


@pytest.mark.parametrize("case", ASKED)
def test_structured_outputs_are_taken_by_both_endpoints(case: str, server: Running) -> None:
    asked, pattern = ASKED[case]
    extra = {"extra_body": {"structured_outputs": asked}}

    chat = server.openai.chat.completions.create(**CHAT, **extra).choices[0].message.content
    text = server.openai.completions.create(**TEXT, **extra).choices[0].text

    assert re.fullmatch(pattern, chat) and re.fullmatch(pattern, text)


def test_plain_text_needs_no_form(server: Running) -> None:
    settings = TEXT | {"max_tokens": 10}

    plain = server.openai.completions.create(**settings)
    asked = server.openai.completions.create(extra_body={"response_format": {"type": "text"}}, **settings)

    assert asked.choices[0].text == plain.choices[0].text


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a schema that does not compile": ({"response_format": named({"type": "nope"})}, "response_format", "json_schema does not compile: Invalid type"),
    "a schema that nothing fits": ({"response_format": named({"type": "integer", "minimum": 2, "maximum": 1})}, "response_format", "minimum"),
    "a schema that is a list": ({"response_format": named([1])}, "response_format", "give a JSON object"),  # type: ignore[arg-type]
    "a schema too long": ({"response_format": named({"title": "a" * MAX_LENGTH})}, "response_format", "give at most 65,536"),
    "a schema too deep": ({"response_format": named(json.loads('{"not": ' * 900 + "{}" + "}" * 900))}, "response_format", "response_format: "),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    "only a name": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema", "required"),
    "a schema beside it": ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "not permitted"),
    "a schema of another type": ({"response_format": named({}) | {"type": "text"}}, "response_format.json_schema", "does not go with the type"),
    "a type that is none": ({"response_format": {"type": "json"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
    "no type": ({"response_format": {}}, "response_format.type", "required"),
    "a regex": ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex", "unclosed group"),
    "a regex too long": ({"structured_outputs": {"regex": "a" * (MAX_LENGTH + 1)}}, "structured_outputs.regex", "give at most 65,536"),
    "a regex that is a number": ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex", "valid string"),
    "a regex of half a character": ({"structured_outputs": {"regex": "a\ud800"}}, "structured_outputs.regex", "does not compile"),
    "a grammar": ({"structured_outputs": {"grammar": "start: foo"}}, "structured_outputs.grammar", 'unknown name: "foo"'),
    "a grammar that is GBNF": ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "structured_outputs.grammar", "does not compile"),
    "no choices": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "give a JSON array of strings"),
    "too many choices": ({"structured_outputs": {"choice": [str(i) for i in range(1001)]}}, "structured_outputs.choice", "give at most 1,000"),
    "text that is no JSON": ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is not JSON"),
    "two": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "holds regex and choice; give one of json, regex"),
    "none": ({"structured_outputs": {}}, "structured_outputs", "holds nothing"),
    "vLLM's own": ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "is not supported"),
    "misspelt": ({"structured_outputs": {"regx": "a"}}, "structured_outputs.regx", "did you mean 'regex'"),
    "both": ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs", "leave one out"),
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_form_that_cannot_be_is_refused_by_its_field(case: str, path: str, server: Running) -> None:
    fields, param, message = REFUSED[case]
    start = {"prompt": "a"} if path == "/v1/completions" else {"messages": MESSAGES}

    for stream in (False, True):
        body = json.dumps(start | fields | {"stream": stream})
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})

        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["type"]) == (param, "invalid_request_error") and message in error["message"]
        assert error["message"].startswith(param) or "both ask" in error["message"]
    assert server.thread.is_alive and not server.engine.has_work


def test_a_model_without_the_library_says_which_extra(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(server.engine.__dict__, "compiler", raising=False)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"install quantkit\[structured\]"):
        server.openai.chat.completions.create(response_format={"type": "json_object"}, **CHAT)


def test_while_a_structure_compiles_others_are_served(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    released, compiled = threading.Event(), Compiler._compiled
    began: list[str] = []

    def slowly(self: Compiler, structure: Structure) -> Any:
        began.append(threading.current_thread().name)
        assert released.wait(SECONDS)
        return compiled(self, structure)

    monkeypatch.setattr(Compiler, "_compiled", slowly)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(server.openai.completions.create, extra_body={"structured_outputs": {"regex": "slow!"}}, **TEXT)
        until(lambda: bool(began))

        quick = server.openai.completions.create(**TEXT | {"max_tokens": 4})
        assert quick.choices[0].text and server.http.get("/health").status_code == 200
        assert not slow.done() and not server.engine.has_work

        released.set()
        assert slow.result().choices[0].text == "slow!"
    assert all(name.startswith("quantkit-structure") for name in began)


def test_a_structure_that_takes_too_long_is_refused_in_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(Compiler, "_compiled", lambda self, structure: released.wait(SECONDS))
    monkeypatch.setattr(server.engine.compiler, "_seconds", 0.2)

    asked = [{"structured_outputs": {"regex": f"long{i}"}} for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        start = time.monotonic()
        responses = list(pool.map(lambda extra: server.http.post("/v1/completions", json=TEXT | extra), asked))
    released.set()

    assert time.monotonic() - start < 5
    by_status = {response.status_code: response.json()["error"]["message"] for response in responses}
    assert sorted(response.status_code for response in responses) == [400, 400, 503]  # two threads compile, the third never began
    assert "takes more than 0.2 seconds" in by_status[400] and "try again later" in by_status[503]


def test_who_waits_for_one_structure_gets_one_compilation(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    count, compiled = [], Compiler._compiled
    monkeypatch.setattr(Compiler, "_compiled", lambda self, structure: count.append(structure) or compiled(self, structure))

    async def several() -> list[Any]:
        compiler = server.engine.compiler
        return await asyncio.gather(*(compiler.compile_beside(Structure("regex", "together")) for _ in range(8)))

    matchers = asyncio.run(several())

    assert len(count) == 1 and len({id(matcher) for matcher in matchers}) == 8


def test_what_grows_too_large_on_the_way_fails_that_request_alone(server: Running) -> None:
    schema = {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(1800)}}

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.openai.completions.create, **TEXT | {"max_tokens": 20})
        with pytest.raises(openai.BadRequestError, match="no token can follow"):
            server.openai.completions.create(**TEXT, extra_body={"response_format": named(schema)})

    assert other.result().choices[0].text and server.thread.is_alive
