"""Grade-school word problems of one to three steps in GSM8K's form: reasoning lines with <<a+b=c>> marks, then `#### N`."""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = [
    "Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Ella", "Leo", "Zoe", "Jack", "Nora", "Finn", "Ruby", "Omar", "Ivy", "Noah", "Lily",
    "Adam", "Rosa", "Kofi", "Mei", "Raj", "Sara", "Hugo", "Lena", "Paul", "Tina", "Yusuf", "Clara", "Dan", "Emma", "Felix", "Gina", "Henry",
    "Iris", "John", "Kate", "Liam", "Maya",
]
THINGS = [
    "apples", "pears", "books", "coins", "shells", "pencils", "stickers", "marbles", "cards", "eggs", "flowers", "cookies", "stamps",
    "buttons", "balloons", "stones", "cups", "candles", "nuts", "plums", "oranges", "toys", "kites", "beads", "leaves",
]
PLACES = ["garden", "shop", "market", "school", "park", "kitchen", "farm", "library", "beach", "house"]
LARGEST = 60


@dataclass(frozen=True)
class WordProblem:
    question: str
    answer: str

    @property
    def result(self) -> int:
        return int(self.answer.rsplit("#### ", 1)[1])


def _calculation(a: int, operator: str, b: int) -> tuple[str, int]:
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return f"{a}{operator}{b}=<<{a}{operator}{b}={value}>>{value}", value


def word_problem(rng: random.Random) -> WordProblem:
    """One problem; every number on the way is between 0 and about 60."""
    who, other = rng.sample(NAMES, 2)
    thing, distraction = rng.sample(THINGS, 2)
    have = rng.randint(2, 20)
    story = [
        rng.choice(
            (
                f"{who} has {have} {thing}.",
                f"There are {have} {thing} in {who}'s {rng.choice(PLACES)}.",
                f"{who} finds {have} {thing} at the {rng.choice(PLACES)}.",
            )
        )
    ]
    lines: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        event, line, have = _step(rng, who, other, thing, have)
        story.append(event)
        lines.append(line)
    if rng.random() < 0.25:
        story.insert(1, f"{who} also has {rng.randint(2, 20)} {distraction}.")
    ask = rng.choice(
        (f"How many {thing} does {who} have now?", f"How many {thing} are there in the end?", f"How many {thing} does {who} have at the end?")
    )
    return WordProblem(" ".join([*story, ask]), "\n".join([*lines, f"#### {have}"]))


def _step(rng: random.Random, who: str, other: str, thing: str, have: int) -> tuple[str, str, int]:
    kinds = (
        [_gain] if have < 2 else [_gain, _gain, _lose, _lose, _exchange] if have <= 12 else [_gain, _lose, _lose] if have <= LARGEST - 12 else [_lose]
    )
    return rng.choice(kinds)(rng, who, other, thing, have)


def _gain(rng: random.Random, who: str, other: str, thing: str, have: int) -> tuple[str, str, int]:
    n = rng.randint(1, 12)
    text, value = _calculation(have, "+", n)
    event = rng.choice((f"{other} gives {who} {n} more {thing}.", f"Then {who} buys {n} more.", f"{who} picks up {n} more {thing}."))
    return event, rng.choice((f"Now {who} has {text} {thing}.", f"After that there are {text} {thing}.")), value


def _lose(rng: random.Random, who: str, other: str, thing: str, have: int) -> tuple[str, str, int]:
    n = rng.randint(1, min(have, 12))
    text, value = _calculation(have, "-", n)
    event = rng.choice((f"{who} gives {n} {thing} to {other}.", f"{who} loses {n} of them.", f"Then {who} sells {n} {thing}."))
    return event, rng.choice((f"Then {who} has {text} {thing}.", f"That leaves {text} {thing}.")), value


def _exchange(rng: random.Random, who: str, other: str, thing: str, have: int) -> tuple[str, str, int]:
    n = rng.choice((2, 3))
    text, value = _calculation(have, "*", n)
    event = f"{other} has {('twice', 'three times')[n - 2]} as many {thing} as {who}, and gives them all to {who} in exchange."
    return event, f"{other} had {text} {thing}, so now {who} has {value}.", value


def format_problem(item: WordProblem, *, with_answer: bool = True) -> str:
    """lm-eval's prompt form for GSM8K."""
    return f"Question: {item.question}\nAnswer:" + (f" {item.answer}" if with_answer else "")
