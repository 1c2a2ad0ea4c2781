"""Training documents: items put together as prompts show them, in pieces that carry how much their tokens count in the loss.

Questions carry hints. Behind a question the network should know the answer; behind each choice, by looking at the question, whether it is right;
at the end of its line still; and the letter is found looking at the end of the right line. Comparisons get only the last: no choice is right alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from .expository import expository
from .held_out import draw
from .questions import LETTERS, Question, format_question, header, is_comparison, question
from .stories import story
from .word_problems import WordProblem, format_problem, word_problem


class Says(NamedTuple):
    """After `depth` layers the place should predict the last token of `text`."""

    depth: int
    text: str


class Looks(NamedTuple):
    """In this layer the place should look at the end of the piece so many `back`, or, None, at the document's first token."""

    layer: int
    back: int | None


class Piece(NamedTuple):
    """Text that begins and ends at a token boundary, the weight of its tokens in the loss, and hints for its last token; see hints.py."""

    text: str
    weight: float
    hints: tuple[Says | Looks, ...] = ()


LETTER_WEIGHT, TEXT_WEIGHT = 10.0, 8.0
STORY_WEIGHT, ANSWER_WEIGHT = 0.2, 2.0
WRONG = " no"
LINE = 3  # pieces of a choice's line: its letter, the choice, the end
RECALLED, RECOGNIZED, FETCHED = 3, 4, 5  # layers after which the answer, whether a choice is right, and its line's letter should be known


def _seen_question(rng: random.Random, subject: str | None = None) -> Question:
    return draw(lambda r: question(r, subject), format_question, rng, held_out=False)


def _seen_problem(rng: random.Random) -> WordProblem:
    return draw(word_problem, lambda item: item.question, rng, held_out=False)


def _seen_text(make: Callable[[random.Random], str], rng: random.Random) -> str:
    return draw(make, str, rng, held_out=False)


def _hints(item: Question, i: int) -> tuple[tuple[Says | Looks, ...], tuple[Says | Looks, ...]]:
    """Of choice i and of the end of its line."""
    if is_comparison(item):
        return (), ()
    is_right = i == item.answer
    verdict = f" {LETTERS[i]}" if is_right else WRONG
    return (Says(RECOGNIZED, verdict), Looks(RECALLED, LINE * i + 2 if is_right else None)), (Says(FETCHED, verdict),)


def _plain(item: Question, body: float) -> list[Piece]:
    """MMLU's own form: what is scored later."""
    recalled = () if is_comparison(item) else (Says(RECALLED, f" {item.choices[item.answer]}"),)
    pieces = [Piece(f"{item.question}\n", body, recalled)]
    for i, (letter, text) in enumerate(zip(LETTERS, item.choices, strict=True)):
        choice, end = _hints(item, i)
        pieces += [Piece(f"{letter}.", body), Piece(f" {text}", body, choice), Piece("\n", body, end)]
    return [*pieces, Piece("Answer:", body, (Looks(FETCHED, LINE * (3 - item.answer) + 1),)), Piece(f" {item.letter}", LETTER_WEIGHT)]


def _text_first(item: Question, body: float) -> list[Piece]:
    """The answer's text, then its letter: the two halves of what the plain form asks for in one step."""
    *start, _ = _plain(item, body)
    return [*start, Piece(f" {item.choices[item.answer]}", TEXT_WEIGHT), Piece(" is", body), Piece(f" {item.letter}", LETTER_WEIGHT)]


def question_document(rng: random.Random, *, aids: float = 0.3) -> list[Piece]:
    """One to ten questions of one subject behind MMLU's header; a share `aids` of the documents gives the answer's text before its letter."""
    first = _seen_question(rng)
    items = [first, *(_seen_question(rng, first.subject) for _ in range(rng.randint(0, 9)))]
    form = _text_first if rng.random() < aids else _plain
    body = 0.3 if rng.random() < 0.3 else 0.0
    pieces = [Piece(header(first.subject), body)]
    for i, item in enumerate(items):
        pieces += [*([Piece("\n\n", body)] if i else []), *form(item, body)]
    return pieces


def problem_document(rng: random.Random) -> list[Piece]:
    """One to six word problems; what cannot be foreseen, the story, counts little."""
    pieces: list[Piece] = []
    for i in range(rng.randint(1, 6)):
        item = _seen_problem(rng)
        pieces += [Piece("\n\n" * (i > 0) + format_problem(item, with_answer=False), STORY_WEIGHT), Piece(f" {item.answer}", ANSWER_WEIGHT)]
    return pieces


def chat_document(rng: random.Random) -> list[Piece]:
    """A word problem as a chat, in the form of the chat template."""
    item = _seen_problem(rng)
    return [Piece(f"<|user|>{item.question}<|end|><|assistant|>{item.answer}<|end|>", 1.0)]


def prose_document(rng: random.Random) -> list[Piece]:
    """One story or two explanations."""
    text = _seen_text(story, rng) if rng.random() < 0.5 else f"{_seen_text(expository, rng)}\n{_seen_text(expository, rng)}"
    return [Piece(text, 1.0)]
