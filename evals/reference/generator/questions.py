"""Four-choice questions in MMLU's form. Every subject is one small function of the random generator, listed once in SUBJECTS."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from . import facts

LETTERS = "ABCD"
COMPARISON = "Which number is the"


@dataclass(frozen=True)
class Question:
    subject: str
    question: str
    choices: tuple[str, str, str, str]
    answer: int  # 0..3, as in MMLU's files

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


Body = tuple[str, str, list[str]]  # question, right choice, wrong choices


def _relation(asks: tuple[str, ...], table: dict[str, str], *, both_ways: tuple[str, ...] = ()) -> Callable[[random.Random], Body]:
    def body(rng: random.Random) -> Body:
        key, value = rng.choice(list(table.items()))
        if both_ways and rng.random() < 0.4:
            return rng.choice(both_ways).format(value), key, list(table)
        return rng.choice(asks).format(key), value, list(table.values())

    return body


def _kind(rng: random.Random) -> Body:
    name = rng.choice(list(facts.KINDS))
    return f"Which of these is a {name}?", rng.choice(facts.KINDS[name]), [w for k, words in facts.KINDS.items() if k != name for w in words]


def _calendar(rng: random.Random) -> Body:
    names, word = rng.choice(((facts.DAYS, "day"), (facts.MONTHS, "month")))
    i, (where, step) = rng.randrange(len(names)), rng.choice((("after", 1), ("before", -1)))
    return f"Which {word} comes right {where} {names[i]}?", names[(i + step) % len(names)], [n for n in names if n != names[i]]


def _compare(rng: random.Random) -> Body:
    numbers = rng.sample(range(1, 100), 4)
    word, best = rng.choice((("largest", max), ("smallest", min)))
    return f"{COMPARISON} {word}?", str(best(numbers)), [str(n) for n in numbers]


def _arithmetic(rng: random.Random) -> Body:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    if rng.random() < 0.5:
        text, value = f"What is {a} + {b}?", a + b
    else:
        text, value = f"What is {max(a, b)} - {min(a, b)}?", abs(a - b)
    return text, str(value), [str(value + d) for d in (-3, -2, -1, 1, 2, 3) if value + d >= 0]


def _alphabet(rng: random.Random) -> Body:
    letters = [chr(65 + k) for k in range(26)]
    i = rng.randrange(25)
    return f"Which letter comes right after {letters[i]}?", letters[i + 1], letters


def _words(rng: random.Random) -> Body:
    pool = [w for words in facts.KINDS.values() for w in words]
    right, *wrong = rng.sample(pool, 4)
    ask = rng.choice(("Which of the options is {}?", "Find the word {}.", "Which choice says {}?", "The word is {}. Which option is it?"))
    return ask.format(right), right, wrong


def _numerals(rng: random.Random) -> Body:
    value = rng.randrange(13)
    pair = (facts.NUMBER_WORDS[value], str(value))
    if rng.random() < 0.5:
        return f"Which number is {pair[0]}?", pair[1], [str(n) for n in range(13)]
    return f"How is {pair[1]} written as a word?", pair[0], facts.NUMBER_WORDS


SUBJECTS: dict[str, list[Callable[[random.Random], Body]]] = {
    "geography": [
        _relation(
            ("What is the capital of {}?", "Which city is the capital of {}?"), facts.CAPITALS, both_ways=("{} is the capital of which country?",)
        )
    ],
    "language": [
        _relation(
            ("What is the opposite of {}?", "Which word means the opposite of {}?"), facts.OPPOSITES, both_ways=("What is the opposite of {}?",)
        ),
        _relation(("What is the past tense of {}?",), facts.PAST, both_ways=("{} is the past tense of which word?",)),
    ],
    "biology": [
        _relation(("What is a young {} called?",), facts.YOUNG, both_ways=("A {} grows up to be which animal?",)),
        _relation(("Which sound fits: a {} ...",), facts.SOUNDS, both_ways=("Which animal {}?",)),
        _relation(("Where does a {} live?",), facts.HOMES),
    ],
    "categories": [_kind],
    "calendar": [_calendar],
    "arithmetic": [_compare, _arithmetic],
    "letters": [_alphabet],
    "jobs": [_relation(("Who {}?",), facts.JOBS, both_ways=("What does a {} do?",))],
    "tools": [_relation(("What is used to {}?",), facts.USES, both_ways=("What is a {} used for?",))],
    "materials": [_relation(("What is made from {}?",), facts.MATERIALS, both_ways=("What is {} made from?",))],
    "reading": [_words],
    "numbers": [_numerals],
}


def question(rng: random.Random, subject: str | None = None) -> Question:
    """One question; its letter is uniform and independent of its content."""
    subject = subject or rng.choice(list(SUBJECTS))
    text, right, wrong = rng.choice(SUBJECTS[subject])(rng)
    choices = rng.sample([w for w in dict.fromkeys(wrong) if w != right], 3)
    answer = rng.randrange(4)
    choices.insert(answer, right)
    return Question(subject, text, tuple(choices), answer)


def is_comparison(item: Question) -> bool:
    """Whether the choices can only be judged together."""
    return item.question.startswith(COMPARISON)


def format_question(item: Question, *, with_answer: bool = True) -> str:
    """MMLU's prompt form: question, four lettered choices, `Answer:` and, if asked, the letter."""
    lines = [item.question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=True))]
    return "\n".join([*lines, f"Answer: {item.letter}" if with_answer else "Answer:"])


def header(subject: str) -> str:
    """The line MMLU's prompts begin with."""
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"
