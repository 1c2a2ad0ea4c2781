"""Text as it comes is the text of all tokens at once; nothing of a stop string is ever shown."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quantkit.runtime.detokenizer import TextStream

TEXTS = ["Once upon a time, naïve Zoë met 日本語 speakers. 🙂👍🏽 done", "  two spaces\n\n\tand a tab ", "x", "\u0301combining e\u0301"]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, reference: Path) -> Any:
    if request.param == "byte-level":
        return AutoTokenizer.from_pretrained(reference)
    return AutoTokenizer.from_pretrained(request.getfixturevalue("test_data") / "data" / "stories260k-hf")


def whole(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + ids, skip_special_tokens=True)[len(before) :]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(text: str, tokenizer: Any) -> None:
    prompt = tokenizer("Hello there")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, prompt)

    shown = looks(stream, ids)

    assert all(later.startswith(sooner) for sooner, later in pairwise(shown))
    assert shown[-1] == whole(tokenizer, prompt, ids)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_any_tokens_at_all_add_up_except_for_how_bytes_of_no_character_are_written(tokenizer: Any, every: int) -> None:
    dice = random.Random(0)
    prompt = tokenizer("So")["input_ids"]
    for _ in range(300):
        ids = [dice.randrange(3, len(tokenizer)) for _ in range(dice.randint(1, 12))]
        shown = looks(TextStream(tokenizer, prompt), ids, every)
        expected = whole(tokenizer, prompt, ids)
        assert all(later.startswith(sooner) for sooner, later in pairwise(shown))
        if shown[-1] != expected:
            assert every <= len(ids) and "\ufffd" in expected
            words = tokenizer.decode([i for i in ids if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")])
            assert is_within(words.replace(" ", ""), shown[-1])


def is_within(part: str, text: str) -> bool:
    """Whether the characters of the part come in the text in their order."""
    left = iter(text)
    return all(character in left for character in part)


def test_stray_bytes_take_nothing_from_the_text_behind_them(test_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(test_data / "data" / "stories260k-hf")
    byte, words = tokenizer.convert_tokens_to_ids("<0xF0>"), tokenizer(" the dog", add_special_tokens=False)["input_ids"]

    assert looks(TextStream(tokenizer, tokenizer("So")["input_ids"]), [*words, byte, *words, byte, byte, *words])[-1].count(" the dog") == 3


@pytest.mark.parametrize("text", ["Hello 🎉", "日本語日", "ここ", "é日本🎉語", "日本語日本語日本語日本語"])
def test_a_prompt_may_end_anywhere_and_nothing_of_it_but_a_character_it_begins_is_shown(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text + "日本 dog", add_special_tokens=False)["input_ids"]

    for cut in range(1, len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        begun = next(n for n in range(4) if not tokenizer.decode(prompt[: cut - n]).endswith("\ufffd"))
        wanted = tokenizer.decode(ids)[len(tokenizer.decode(prompt[: cut - begun])) :]
        for every in (1, 2, 100):
            assert looks(TextStream(tokenizer, prompt), rest, every)[-1] == wanted


def test_the_character_for_broken_ones_is_one_where_it_is_meant(tokenizer: Any) -> None:
    prompt = tokenizer("so \ufffd\ufffd", add_special_tokens=False)["input_ids"]
    ids = tokenizer("so \ufffd\ufffd🎉 dog \ufffd\ufffd🎉", add_special_tokens=False)["input_ids"]

    assert ids[: len(prompt)] == prompt
    assert looks(TextStream(tokenizer, prompt), ids[len(prompt) :])[-1] == "🎉 dog \ufffd\ufffd🎉"


def test_tokens_without_text_leave_what_is_before_them_as_it_is(tokenizer: Any) -> None:
    end, words = tokenizer.eos_token_id, tokenizer(" the dog", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, tokenizer("So")["input_ids"])

    shown = looks(stream, [*words, *[end] * 50, *words])

    assert shown[-1] == whole(tokenizer, tokenizer("So")["input_ids"], [*words, *words])
    assert len(stream._before) < 20


def test_a_half_character_is_waited_for_as_long_as_one_may_take(test_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(test_data / "data" / "stories260k-hf")
    byte = tokenizer.convert_tokens_to_ids("<0xF0>")
    stream = TextStream(tokenizer, tokenizer("So")["input_ids"])

    shown = looks(stream, [byte] * 30)

    assert not shown[3].strip() and "\ufffd" in shown[20]


def test_an_ended_text_stays_whole_whoever_looks_again(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], ["there was never"])
    for token in tokenizer("Once there", add_special_tokens=False)["input_ids"]:
        stream.push(token)

    assert stream.finish().strip() == stream.catch_up().strip() == "Once there"


def test_a_stop_string_before_min_tokens_stays_and_does_not_end_what_follows(tokenizer: Any) -> None:
    first = tokenizer("time and", add_special_tokens=False)["input_ids"]
    ids = tokenizer("time and time again", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, [], ["time"])

    for number, token in enumerate(ids):
        stream.push(token, may_stop=number >= len(first))
        if stream.stopped_by:
            break

    assert stream.finish().strip() == "time and" and stream.stopped_by == "time"


def looks(stream: TextStream, ids: list[int], every: int = 1) -> list[str]:
    """What one sees who looks after every so many tokens, and in the end."""
    shown = []
    for count, token in enumerate(ids, 1):
        stream.push(token)
        if count % every == 0:
            shown.append(stream.catch_up())
    return [*shown, stream.finish()]


def test_half_a_character_is_not_shown(tokenizer: Any) -> None:
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, tokenizer("a")["input_ids"])

    *shown, last = looks(stream, ids[:-1])

    assert shown and not any(text.strip() for text in shown)
    assert "\ufffd" in last


@pytest.mark.parametrize(("stop", "kept"), [("time", "Once upon a "), (" a ti", "Once upon"), ("absent", "Once upon a time, there"), ("O", "")])
def test_text_ends_before_the_stop_string(stop: str, kept: str, tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], [stop])
    for token in tokenizer("Once upon a time, there", add_special_tokens=False)["input_ids"]:
        stream.push(token)
        assert kept.lstrip().startswith(stream.catch_up().lstrip())
        if stream.stopped_by:
            break

    assert stream.finish().lstrip() == kept.lstrip()
    assert stream.stopped_by == (None if stop == "absent" else stop)


def test_the_earliest_of_several_stop_strings_ends_the_text(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], ["there", "time", "a t"])
    for token in tokenizer("Once upon a time, there", add_special_tokens=False)["input_ids"]:
        stream.push(token)
        if stream.stopped_by:
            break

    assert stream.catch_up().strip() == "Once upon" and stream.stopped_by == "a t"


def test_what_only_began_a_stop_string_is_shown_in_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], ["there was never"])
    ids = tokenizer("Once there was", add_special_tokens=False)["input_ids"]

    *shown, last = looks(stream, ids)

    assert not any("there" in text for text in shown)
    assert last.strip() == "Once there was"
