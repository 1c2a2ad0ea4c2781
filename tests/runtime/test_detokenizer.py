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


def test_a_character_that_the_prompt_begins_is_shown_once_it_is_whole(tokenizer: Any) -> None:
    ids = tokenizer("Hello 🎉", add_special_tokens=False)["input_ids"]

    for cut in range(1, 4):
        prompt, rest = ids[:-cut], ids[-cut:]
        if "\ufffd" in tokenizer.decode(prompt):
            assert looks(TextStream(tokenizer, prompt), rest)[-1] == "🎉"


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
