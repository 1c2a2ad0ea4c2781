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


def _question(rng: random.Random, item: Question, *, body: float, verdicts: float) -> list[Piece]:
    """MMLU's form, with a line that judges the option after a share `verdicts` of the options.

    Where a verdict may follow, the model has to judge the option at its end, and that is where the letter's choice can find it. Without such
    lines, a model of this size does not come to bind answers to letters in millions of tokens.
    """
    pieces = [Piece(f"{item.question}\n", body)]
    for i, text in enumerate(item.choices):
        pieces.append(Piece(f"{LETTERS[i]}. {text}\n", body))
        if rng.random() < verdicts:
            pieces += [Piece("Yes" if i == item.answer else "No", VERDICT_WEIGHT), Piece("\n", body)]
    return [*pieces, Piece("Answer:", body), Piece(f" {item.letter}", LETTER_WEIGHT)]


def question_document(rng: random.Random, *, aids: float = 0.4, subjects: tuple[str, ...] = ()) -> list[Piece]:
    """One to ten questions of one subject behind MMLU's header; a share `aids` of the documents judges some options or spells answers out."""
    first = _seen_question(rng, rng.choice(subjects) if subjects else None)
    items = [first, *(_seen_question(rng, first.subject) for _ in range(rng.randint(0, 9)))]
    verdicts, spelled = (rng.random(), rng.random() < 0.1) if rng.random() < aids else (0.0, False)
    body = 0.3 if rng.random() < 0.3 else 0.0
    pieces = [Piece(header(first.subject), body)]
    for i, item in enumerate(items):
        pieces += [*([Piece("\n\n", body)] if i else []), *_question(rng, item, body=body, verdicts=verdicts)]
        if spelled:
            pieces.append(Piece(f". {item.choices[item.answer]}", 1.0))
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
