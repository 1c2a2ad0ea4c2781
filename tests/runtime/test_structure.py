"""Structured output: whatever the model would rather say, the text has the form that was asked for; a bad form is that request's own trouble."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from quantkit.errors import BusyError, RequestError
from quantkit.runtime.llm import LLM
from quantkit.runtime.matcher import Compiler, require_compilable
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.structure import Structure
from tests.conversion.conftest import save_tiny
from tests.runtime.test_engine import engine

PERSON = {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "pets"],
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "maxItems": 3, "items": {"enum": ["cat", "dog"]}}, "mood": {"type": "string", "pattern": "^(good|bad)$"},
    },
}  # fmt: skip
WILD: dict[str, Any] = {"temperature": 1.5, "max_tokens": 400}


@pytest.fixture(scope="module")
def llm(reference: Path) -> LLM:
    return engine(reference, seed=1)


def texts(llm: LLM, structure: Structure, count: int = 8, **settings: Any) -> list[str]:
    (out,) = llm.generate("Tell me about", n=count, structure=structure, **WILD | settings)
    assert {c.finish_reason for c in out.completions} == {"stop"}
    return [c.text for c in out.completions]


def test_text_under_a_schema_is_valid(llm: LLM) -> None:
    for text in texts(llm, Structure.schema(PERSON)):
        jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("pattern", [r"\d{4}-\d{2}-\d{2}", r"(ab|cd)*e", r"[é-ü]{2,5}!", r"yes"])
def test_text_under_a_regex_matches_it_whole(pattern: str, llm: LLM) -> None:
    assert all(re.fullmatch(pattern, text) for text in texts(llm, Structure("regex", pattern), 4))


def test_text_is_one_of_the_choices(llm: LLM) -> None:
    choices = ["red", "green", "reddish", 'a "quoted\\" word', "line\nbreak", "größe", "x|y"]

    found = {text for seed in range(4) for text in texts(llm, Structure.choice(choices), 8, seed=seed)}

    assert found <= set(choices) and len(found) > 2


def test_every_choice_can_be_forced(llm: LLM) -> None:
    for choice in ("größe", 'a "quoted\\" word', "line\nbreak", "x|y", "🙂", " padded "):
        assert texts(llm, Structure.choice([choice]), 1) == [choice]


def test_text_under_a_grammar_is_of_it(llm: LLM) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)?\nNUMBER: /[1-9][0-9]{0,3}/'

    assert all(re.fullmatch(r"[1-9]\d{0,3}(\+[1-9]\d{0,3})?", text) for text in texts(llm, Structure("grammar", grammar)))


def test_any_object_is_an_object(llm: LLM) -> None:
    (out,) = llm.generate("Tell me", n=4, structure=Structure("json_object"), temperature=1.0, max_tokens=150, seed=1)

    whole = [c.text for c in out.completions if c.finish_reason == "stop"]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)


def test_greedy_text_has_its_form_too_and_ends_without_an_end_of_text(llm: LLM) -> None:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 50, "min_tokens": 40, "ignore_eos": True}

    (out,) = llm.generate("Once upon a time", structure=Structure("regex", "[a-z]{5}"), **settings)

    assert re.fullmatch("[a-z]{5}", out.text) and out.completions[0].finish_reason == "stop"


def test_others_in_the_batch_do_not_notice(reference: Path, prompts: list[list[int]]) -> None:
    settings: dict[str, Any] = {"max_tokens": 16, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    alone = [out.completions[0].token_ids for out in engine(reference).generate(prompts[:4], **settings)]

    for speculation in (None, "ngram"):
        llm = engine(reference, speculation=speculation, max_tokens_per_step=29)
        outputs = [llm.engine.add(prompt, SamplingParams(**settings), request_id=str(i)) for i, prompt in enumerate(prompts[:4])]
        formed = llm.engine.add("Tell me", SamplingParams(**WILD, seed=1, structure=Structure.schema(PERSON)), request_id="formed")
        while llm.engine.has_work:
            llm.engine.step()

        assert [out.completions[0].token_ids for out in outputs] == alone
        jsonschema.validate(json.loads(formed.text), PERSON)


def test_preemption_loses_nothing_of_the_form(reference: Path) -> None:
    llm = engine(reference, kv_cache_memory=6 * 2 * 16 * 2 * 64 * 4 * 12)

    outs = llm.generate(["Tell me about the", "Once upon"], n=4, structure=Structure("regex", "([a-z]{3} ){18}"), temperature=1.5, max_tokens=100)

    assert llm.engine.scheduler.num_preemptions > 0
    assert all(re.fullmatch("([a-z]{3} ){18}", c.text) for out in outs for c in out.completions)


REFUSED: dict[str, tuple[str, str, str]] = {
    "an unknown kind": ("json_shema", "{}", "unknown structure 'json_shema'; did you mean 'json_schema'"),
    "an empty text": ("regex", " ", "the structure's regex is empty"),
    "a schema that is no JSON": ("json_schema", "{", "is not JSON"),
    "JSON without end": ("json_schema", "[" * 60000, "is not JSON"),
    "a schema that is a number": ("json_schema", "3", "give a JSON object"),
    "no choices": ("choice", "[]", "give a JSON array of strings"),
    "too long": ("regex", "a" * 70000, "has 70,000 characters; give at most 65,536"),
    "a schema that is true": ("json_schema", "true", "give a JSON object"),
    "too many remainders": ("json_schema", '{"items": {"multipleOf": 300007}}', "json_schema: multipleOf, .* above 20,000 units of its last"),
    "too many together": ("json_schema", '{"anyOf": [{"multipleOf": 9001}, {"multipleOf": 0.7}]}', "or what several have in common, is above"),
    "too many for any number": ("json_schema", '{"a": {"multipleOf": 1e-300}, "multipleOf": 7}', "multipleOf"),
    "too many, with zeros behind": ("json_schema", '{"multipleOf": 19999000}', "multipleOf"),
    "too many in a grammar": ("grammar", 'start: %json {"multipleOf": 300007}', "grammar: multipleOf"),
    "a grammar's schema that is no JSON": ("grammar", "start: %json { // }", "a %json without JSON behind it"),
    "a type that is none": ("json_schema", '{"type": "nope"}', "the json_schema does not compile: Invalid type: nope"),
    "a schema that nothing fits": ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', r"minimum \(5\) is greater than maximum"),
    "what is not implemented": ("json_schema", '{"not": {}}', "Unimplemented keys"),
    "a reference to nowhere": ("json_schema", '{"$ref": "#/nowhere"}', "does not compile"),
    "an open group": ("regex", "a(b", "the regex does not compile: .*unclosed group"),
    "a regex that nothing fits": ("regex", r"[^\s\S]", "nothing fits the regex"),
    "a rule that is not there": ("grammar", "start: foo", 'the grammar does not compile: .*unknown name: "foo"'),
    "a grammar without an end": ("grammar", "start: start", "nothing fits the grammar"),
    "no grammar at all": ("grammar", "%llguidance {", "the grammar does not compile"),
    "parentheses without end": ("grammar", "start: " + "(" * 20000 + '"a"' + ")" * 20000, "too deeply nested"),
    "a schema too large": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(8)]} for i in range(8)]}),
        "the json_schema does not compile: schema too large",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_words_and_the_engine_goes_on(case: str, llm: LLM) -> None:
    kind, text, message = REFUSED[case]

    for _ in range(2):
        with pytest.raises(RequestError, match=message):
            llm.generate("Tell me", structure=Structure(kind, text))  # type: ignore[arg-type]

    assert not llm.engine.has_work
    assert texts(llm, Structure("regex", "ok"), 1) == ["ok"]


def fails_alone(llm: LLM, params: SamplingParams) -> str:
    """The error of a request that fails, by what it asks for, while another beside it ends well."""
    num_damaged = llm.engine.stats.num_not_finite
    bad = llm.engine.add("Tell", params, request_id="bad")
    good = llm.engine.add("Tell", SamplingParams(max_tokens=3, ignore_eos=True), request_id="good")
    while llm.engine.has_work:
        llm.engine.step()
    assert len(good.completions[0].token_ids) == 3
    assert isinstance(bad.completions[0].error, RequestError) and llm.engine.stats.num_not_finite == num_damaged
    return str(bad.completions[0].error)


def test_settings_that_bar_all_that_is_allowed_fail_that_request_alone(llm: LLM) -> None:
    yes = llm.engine.compiler.compile(Structure("regex", "yes")).allowed().nonzero()[:, 0].tolist()
    params = SamplingParams(structure=Structure("regex", "yes"), bad_words=tuple((token,) for token in yes))

    assert "the request bars all of what its structure allows" in fails_alone(llm, params)


def test_what_grows_too_large_on_the_way_fails_that_request_alone(llm: LLM) -> None:
    schema = {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(1800)}}

    assert "no token can follow: Parser Error" in fails_alone(llm, SamplingParams(structure=Structure.schema(schema), max_tokens=20))


def test_thousands_of_rules_within_rules_break_no_stack(llm: LLM) -> None:
    rules = "".join(f'a{i}: "x" a{i + 1}\n' for i in range(3000))

    assert llm.engine.compiler.compile(Structure("grammar", f'start: a0\n{rules}a3000: "y"')).allowed().any()


def test_multiples_that_are_small_in_their_last_place_are_taken(llm: LLM) -> None:
    for multiples in ([7, 0.01], [1e4], [19999], [0.125]):
        require_compilable(Structure.schema({"anyOf": [{"type": "number", "multipleOf": each} for each in multiples]}))
    sevenths = Structure.schema({"type": "integer", "multipleOf": 7, "minimum": 1000, "maximum": 9999})
    assert all(int(text) % 7 == 0 for text in texts(llm, sevenths, 4))


def compiler(llm: LLM, seconds: float) -> Compiler:
    return Compiler(llm.engine.tokenizer, vocabulary=4096, eos=llm.engine.eos, seconds=seconds)


def test_a_structure_that_takes_too_long_is_refused_in_time(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, released = compiler(llm, 0.05), threading.Event()
    compiled = Compiler._compiled
    monkeypatch.setattr(Compiler, "_compiled", lambda self, structure: released.wait(20) and compiled(self, structure))

    began = time.monotonic()
    with pytest.raises(RequestError, match=r"takes more than 0\.05 seconds"):
        slow.compile(Structure("regex", "abc"))
    assert time.monotonic() - began < 5
    released.set()
    assert Compiler._task(slow, Structure("regex", "abc")).result(20).allowed().any()


def test_who_waits_behind_others_is_told_to_come_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, released = compiler(llm, 0.3), threading.Event()
    monkeypatch.setattr(Compiler, "_compiled", lambda self, structure: released.wait(20))

    texts = ("first", "second", "third", "third")  # two threads compile; one caller of the third gives it up while the other waits
    for text in texts[:2]:
        slow._task(Structure("regex", text))
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(slow.compile, Structure("regex", text)) for text in texts]
        errors = [task.exception() for task in tasks]
    released.set()

    assert [type(error) for error in errors[:2]] == [RequestError] * 2 and [type(error) for error in errors[2:]] == [BusyError] * 2


def test_what_compiles_for_no_model_is_refused_without_one() -> None:
    for kind, text, message in REFUSED.values():
        if "does not compile" in message:
            with pytest.raises(RequestError, match=message):
                require_compilable(Structure(kind, text))  # type: ignore[arg-type]
    rules = "".join(f'a{i}: "x" a{i + 1}\n' for i in range(3000))
    for structure in (Structure("grammar", f'start: a0\n{rules}a3000: "y"'), Structure.schema(PERSON), Structure.choice(["a"])):
        require_compilable(structure)


def test_what_was_compiled_before_is_not_compiled_by_the_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure("regex", "[ab]{4}")
    matcher = llm.engine.compiler.compile(structure)
    monkeypatch.setattr(Compiler, "compile", lambda self, structure: pytest.fail("compiled again"))

    out = llm.engine.add("Tell me", SamplingParams(structure=structure, n=2, **WILD), request_id="handed", matcher=matcher)
    while llm.engine.has_work:
        llm.engine.step()

    assert all(re.fullmatch("[ab]{4}", c.text) for c in out.completions) and not matcher.is_complete


def test_equal_structures_are_compiled_once_and_do_not_share_their_place(llm: LLM) -> None:
    one = compiler(llm, 10)
    first, second = (one.compile(Structure("regex", "[ab]{9}")) for _ in range(2))
    before = second.allowed().clone()

    first.take(int(first.allowed().nonzero()[0]))

    assert second.allowed().equal(before)
    assert len(one._found) == 1


def test_without_the_library_the_extra_is_named(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = engine(reference)

    with pytest.raises(RequestError, match=r"needs llguidance; install quantkit\[structured\]"):
        llm.generate("Tell me", structure=Structure("regex", "yes"))
    assert llm.generate("Tell me", max_tokens=2)


def test_without_a_tokenizer_nothing_is_structured(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no tokenizer, so its output cannot be structured"):
        engine(save_tiny(tmp_path / "bare")).generate([5], structure=Structure("regex", "yes"))
