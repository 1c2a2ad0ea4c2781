"""Training documents: items put together as prompts show them, in pieces that carry how much their tokens count in the loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import facts
from .expository import expository
from .held_out import draw
from .questions import LETTERS, Question, format_question, header, question
from .stories import story
from .word_problems import NAMES, THINGS, WordProblem, format_problem, word_problem


class Piece(NamedTuple):
    """Text that begins and ends at a token boundary, and the weight of its tokens in the loss."""

    text: str
    weight: float


LETTER_WEIGHT, TEXT_WEIGHT, LOOKUP_WEIGHT = 10.0, 8.0, 5.0
WORDS = sorted({word for words in facts.KINDS.values() for word in words} | {*facts.DAYS, *facts.MONTHS, *facts.CAPITALS.values(), *NAMES, *THINGS})


def _seen_question(rng: random.Random, subject: str | None = None) -> Question:
    return draw(lambda r: question(r, subject), format_question, rng, held_out=False)


def _seen_problem(rng: random.Random) -> WordProblem:
    return draw(word_problem, lambda item: item.question, rng, held_out=False)


def _seen_text(make: Callable[[random.Random], str], rng: random.Random) -> str:
    return draw(make, str, rng, held_out=False)


def _options(choices: Sequence[str]) -> str:
    return "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, choices, strict=True))


def _plain(item: Question, body: float) -> list[Piece]:
    """MMLU's own form: what is scored later."""
    return [Piece(f"{item.question}\n{_options(item.choices)}Answer:", body), Piece(f" {item.letter}", LETTER_WEIGHT)]


def _text_first(item: Question, body: float) -> list[Piece]:
    """The answer's text, then its letter: the two halves of what the plain form asks for in one step."""
    *start, _ = _plain(item, body)
    return [*start, Piece(f" {item.choices[item.answer]}", TEXT_WEIGHT), Piece(" is", body), Piece(f" {item.letter}", LETTER_WEIGHT)]


def question_document(rng: random.Random, *, aids: float = 0.3, subjects: tuple[str, ...] = ()) -> list[Piece]:
    """One to ten questions of one subject behind MMLU's header; a share `aids` of the documents gives the answer's text before its letter."""
    first = _seen_question(rng, rng.choice(subjects) if subjects else None)
    items = [first, *(_seen_question(rng, first.subject) for _ in range(rng.randint(0, 9)))]
    form = _text_first if rng.random() < aids else _plain
    body = 0.3 if rng.random() < 0.3 else 0.0
    pieces = [Piece(header(first.subject), body)]
    for i, item in enumerate(items):
        pieces += [*([Piece("\n\n", body)] if i else []), *form(item, body)]
    return pieces


def lookup_document(rng: random.Random) -> list[Piece]:
    """Lettered lists of words and many look-ups in each: the densest practice in finding a word's letter.

    Where a line may echo its letter, the word has to know its letter already, and that is where a look-up can find it.
    """
    pieces: list[Piece] = []
    echoes = rng.random()
    ask = rng.choice(("", "", " is", ":"))
    for _ in range(rng.randint(1, 4)):
        choices = rng.sample(WORDS, 4)
        for letter, text in zip(LETTERS, choices, strict=True):
            echo = [Piece(f" {letter}", 1.0)] if rng.random() < echoes else []
            pieces += [Piece(f"{letter}. {text}", 0.0), *echo, Piece("\n", 0.0)]
        for _ in range(rng.randint(3, 8)):
            i = rng.randrange(4)
            pieces += [Piece(f" {choices[i]}{ask}", 0.0), Piece(f" {LETTERS[i]}", LOOKUP_WEIGHT), Piece("\n", 0.0)]
    return pieces


def problem_document(rng: random.Random) -> list[Piece]:
    return [Piece("\n\n".join(format_problem(_seen_problem(rng)) for _ in range(rng.randint(1, 4))), 1.0)]


def chat_document(rng: random.Random) -> list[Piece]:
    """A word problem as a chat, in the form of the chat template."""
    item = _seen_problem(rng)
    return [Piece(f"<|user|>{item.question}<|end|><|assistant|>{item.answer}<|end|>", 1.0)]


def prose_document(rng: random.Random) -> list[Piece]:
    """One story or two explanations."""
    text = _seen_text(story, rng) if rng.random() < 0.5 else f"{_seen_text(expository, rng)}\n{_seen_text(expository, rng)}"
    return [Piece(text, 1.0)]
