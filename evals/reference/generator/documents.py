"""Training documents: items put together as prompts show them, in pieces that carry how much their tokens count in the loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from .expository import expository
from .held_out import draw
from .questions import LETTERS, Question, format_question, header, question
from .stories import story
from .word_problems import WordProblem, format_problem, word_problem


class Piece(NamedTuple):
    """Text that begins and ends at a token boundary, and the weight of its tokens in the loss."""

    text: str
    weight: float


LETTER_WEIGHT, VERDICT_WEIGHT = 10.0, 3.0


def _seen_question(rng: random.Random, subject: str | None = None) -> Question:
    return draw(lambda r: question(r, subject), format_question, rng, held_out=False)


def _seen_problem(rng: random.Random) -> WordProblem:
    return draw(word_problem, lambda item: item.question, rng, held_out=False)


def _seen_text(make: Callable[[random.Random], str], rng: random.Random) -> str:
    return draw(make, str, rng, held_out=False)


def _plain(item: Question, body: float) -> list[Piece]:
    """MMLU's own form: what is scored later."""
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, item.choices))
    return [Piece(f"{item.question}\n{options}Answer:", body), Piece(f" {item.letter}", LETTER_WEIGHT)]


def _judged(item: Question, body: float) -> list[Piece]:
    """Every option is followed by a verdict, which teaches to judge an option where it stands."""
    pieces = [Piece(f"{item.question}\n", body)]
    for i, text in enumerate(item.choices):
        pieces += [Piece(f"{LETTERS[i]}. {text} -", body), Piece(" right" if i == item.answer else " wrong", VERDICT_WEIGHT), Piece("\n", body)]
    return [*pieces, Piece("Answer:", body), Piece(f" {item.letter}", LETTER_WEIGHT)]


def _spelled(item: Question, body: float) -> list[Piece]:
    """The answer's text follows its letter."""
    return [*_plain(item, body), Piece(".", body), Piece(f" {item.choices[item.answer]}", 2.0)]


def _text_first(item: Question, body: float) -> list[Piece]:
    """The answer's text comes before its letter."""
    *rest, _ = _plain(item, body)
    return [*rest, Piece(f" {item.choices[item.answer]}", 2.0), Piece(" is", body), Piece(f" {item.letter}", LETTER_WEIGHT)]


def question_document(rng: random.Random, *, aids: float = 0.4) -> list[Piece]:
    """Two to ten questions of one subject behind MMLU's header; `aids` of the documents use a form that teaches to bind answer and letter."""
    first = _seen_question(rng)
    form = rng.choice((_judged, _judged, _spelled, _text_first)) if rng.random() < aids else _plain
    body = 0.3 if rng.random() < 0.3 else 0.0
    pieces = [Piece(header(first.subject), body)]
    items = [first, *(_seen_question(rng, first.subject) for _ in range(rng.randint(1, 9)))]
    for i, item in enumerate(items):
        pieces += [*([Piece("\n\n", body)] if i else []), *form(item, body)]
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
