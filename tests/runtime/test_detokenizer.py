"""Text as it comes is the text of all tokens at once; nothing of a stop string is ever shown."""

from __future__ import annotations

import random
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

    pieces = [stream.push(i) for i in ids] + [stream.finish()]

    assert "".join(pieces) == stream.text == whole(tokenizer, prompt, ids)


def test_any_tokens_at_all_add_up_except_that_bytes_of_no_character_may_be_written_otherwise(tokenizer: Any) -> None:
    dice = random.Random(0)
    for _ in range(200):
        prompt = tokenizer("So")["input_ids"]
        ids = [dice.randrange(3, len(tokenizer)) for _ in range(dice.randint(1, 12))]
        stream = TextStream(tokenizer, prompt)
        text = "".join([*(stream.push(i) for i in ids), stream.finish()])
        expected = whole(tokenizer, prompt, ids)
        assert text == expected or "\ufffd" in expected


def test_half_a_character_is_not_shown(tokenizer: Any) -> None:
    ids = tokenizer("日", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, tokenizer("a")["input_ids"])

    shown = [stream.push(i) for i in ids[:-1]]

    assert not any("\ufffd" in piece for piece in shown)
    assert "\ufffd" in stream.finish()


@pytest.mark.parametrize(("stop", "kept"), [("time", "Once upon a "), (" a ti", "Once upon"), ("absent", "Once upon a time, there"), ("O", "")])
def test_text_ends_before_the_stop_string(stop: str, kept: str, tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], [stop])
    shown = ""
    for token in tokenizer("Once upon a time, there", add_special_tokens=False)["input_ids"]:
        shown += stream.push(token)
        assert kept.lstrip().startswith(shown.lstrip())
        if stream.stopped_by:
            break
    shown += stream.finish()

    assert shown.lstrip() == kept.lstrip()
    assert stream.stopped_by == (None if stop == "absent" else stop)


def test_the_earliest_of_several_stop_strings_ends_the_text(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], ["there", "time", "a t"])
    for token in tokenizer("Once upon a time, there", add_special_tokens=False)["input_ids"]:
        stream.push(token)
        if stream.stopped_by:
            break

    assert stream.text.strip() == "Once upon" and stream.stopped_by == "a t"


def test_what_only_began_a_stop_string_is_shown_in_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer, [], ["there was never"])
    ids = tokenizer("Once there was", add_special_tokens=False)["input_ids"]

    held = "".join(stream.push(i) for i in ids)

    assert "there" not in held
    assert (held + stream.finish()).strip() == "Once there was"
