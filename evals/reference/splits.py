"""The held-out splits and few-shot examples, made anew from their seeds. Run from the repository's root:

python -m evals.reference.splits          # writes evals/reference/splits/*.jsonl
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from .generator import Question, WordProblem, draw, expository, format_question, question, story, word_problem
from .generator.questions import SUBJECTS

FOLDER = Path(__file__).parent / "splits"
NUM_PROBLEMS, NUM_QUESTIONS, NUM_TEXTS = 500, 1000, 200
NUM_SHOTS = 5

Row = dict[str, object]


def _distinct(make: Callable[[random.Random], object], text_of: Callable[[object], str], *, count: int, seed: int) -> list:
    rng, found = random.Random(seed), {}
    while len(found) < count:
        item = draw(make, text_of, rng, held_out=True)
        found.setdefault(text_of(item), item)
    return list(found.values())


def _problem_row(item: WordProblem) -> Row:
    return asdict(item)


def _question_row(item: Question) -> Row:
    return {**asdict(item), "choices": list(item.choices)}


def _problems() -> list[Row]:
    return [_problem_row(p) for p in _distinct(word_problem, lambda p: p.question, count=NUM_PROBLEMS + NUM_SHOTS, seed=11)]


def _questions(subject: str, count: int) -> list[Row]:
    return [
        _question_row(q)
        for q in _distinct(lambda rng: question(rng, subject), format_question, count=count, seed=100 + list(SUBJECTS).index(subject))
    ]


def _text_rows() -> list[Row]:
    stories = _distinct(story, str, count=NUM_TEXTS // 2, seed=31)
    explanations = _distinct(expository, str, count=NUM_TEXTS, seed=32)
    pairs = [f"{a}\n{b}" for a, b in zip(explanations[::2], explanations[1::2], strict=True)]
    return [{"text": text} for both in zip(stories, pairs, strict=True) for text in both]


def make_splits() -> dict[str, list[Row]]:
    """File stem to rows. Questions: as many of every subject; few-shot examples: five of every subject."""
    problems = _problems()
    each = -(-NUM_QUESTIONS // len(SUBJECTS))
    by_subject = {subject: _questions(subject, each + NUM_SHOTS) for subject in SUBJECTS}
    return {
        "word_problems": problems[NUM_SHOTS:],
        "word_problems_fewshot": problems[:NUM_SHOTS],
        "questions": [row for group in zip(*(rows[NUM_SHOTS:] for rows in by_subject.values()), strict=True) for row in group],
        "questions_fewshot": [row for rows in by_subject.values() for row in rows[:NUM_SHOTS]],
        "prose": _text_rows(),
    }


def dump(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load(stem: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{stem}.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for stem, rows in make_splits().items():
        (FOLDER / f"{stem}.jsonl").write_text(dump(rows), encoding="utf-8")
        print(f"{stem}: {len(rows)} rows")


if __name__ == "__main__":
    main()
