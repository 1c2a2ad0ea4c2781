"""Problems and conversations of our own, made by rule from a seed: worked arithmetic and algebra, tool calls, extraction, editing.

They cover the control tokens and the step-by-step form that found texts lack; no sentence is taken from anywhere.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

Message = dict[str, Any]
NAMES = "Ada Ben Chen Dana Emeka Farah Goran Hana Ivo Jun Kavya Leo Mina Noor Omar Priya Quinn Rosa Sven Tala Uma Viktor Wen Yara Zoe".split()  # noqa: SIM905
THINGS = "apples pencils tickets candles bricks seedlings postcards bolts buttons marbles tiles envelopes notebooks ribbons lamps".split()  # noqa: SIM905
PLACES = "Lisbon Nairobi Osaka Quito Tallinn Hanoi Oslo Cusco Accra Bergen Pune Turin Perth Malmö Izmir Leeds Lagos Dakar Riga Kyoto".split()  # noqa: SIM905

MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905


def problems(count: int) -> Iterator[list[Message]]:
    """Conversations of one to three problems, every answer with its steps."""
    rng = random.Random("problems")
    for _ in range(count):
        messages: list[Message] = []
        for kind in rng.sample(PROBLEMS, rng.randint(1, 3)):
            question, answer = kind(rng)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield messages


def _shopping(rng: random.Random) -> tuple[str, str]:
    name, (first, second) = rng.choice(NAMES), rng.sample(THINGS, 2)
    a, b, p, q = rng.randint(3, 24), rng.randint(2, 19), rng.randint(2, 15), rng.randint(2, 12)
    total = a * p + b * q
    paid = (total // 50 + 1) * 50
    question = f"{name} buys {a} {first} at ${p} each and {b} {second} at ${q} each, and pays with ${paid}. How much change does {name} get?"
    answer = (
        f"The {first} cost {a} × {p} = {a * p} dollars, and the {second} cost {b} × {q} = {b * q} dollars. "
        f"Together that is {a * p} + {b * q} = {total} dollars.\n\n"
        f"{name} pays {paid} dollars, so the change is {paid} - {total} = {paid - total} dollars.\n\n"
        f"Answer: ${paid - total}"
    )
    return question, answer


def _linear(rng: random.Random) -> tuple[str, str]:
    x, a, b, c = rng.randint(-12, 12), rng.randint(2, 9), rng.randint(-20, 20), rng.randint(-9, 9)
    c = c if c not in (0, a) else c + 1 if c + 1 not in (0, a) else c - 1
    d = a * x + b - c * x
    left, right = f"{a}x {_signed(b)}", f"{c}x {_signed(d)}"
    answer = (
        f"Bring the terms with x to the left and the numbers to the right:\n\n{a}x {_signed(-c)}x = {d} {_signed(-b)}\n{a - c}x = {d - b}\n\n"
        f"Divide both sides by {a - c}: x = {x}.\n\n"
        f"Check: {a} · ({x}) {_signed(b)} = {a * x + b} and {c} · ({x}) {_signed(d)} = {c * x + d}. Both sides agree."
    )
    return f"Solve for x: {left} = {right}.", answer


def _signed(n: int) -> str:
    return f"+ {n}" if n >= 0 else f"- {-n}"


def _quadratic(rng: random.Random) -> tuple[str, str]:
    p, q = rng.randint(-9, 9), rng.randint(-9, 9)
    b, c = -(p + q), p * q
    answer = (
        f"We look for two numbers whose product is {c} and whose sum is {b}. They are {-p} and {-q}, so\n\n"
        f"x² {_signed(b)}x {_signed(c)} = (x {_signed(-p)})(x {_signed(-q)}).\n\n"
        + (f"Both factors vanish at x = {p}, a double root." if p == q else f"A product is zero when a factor is: x = {p} or x = {q}.")
    )
    return f"Find all real solutions of x² {_signed(b)}x {_signed(c)} = 0.", answer


def _percent(rng: random.Random) -> tuple[str, str]:
    price, up, down = rng.randint(4, 90) * 20, rng.choice([5, 10, 15, 20, 25, 30]), rng.choice([5, 10, 20, 25, 40])
    first = Fraction(price * (100 + up), 100)
    last = first * Fraction(100 - down, 100)
    verdict = "more than" if last > price else "less than" if last < price else "the same as"
    question = (
        f"A bicycle costs ${price}. The price rises by {up}% and then falls by {down}%. "
        "What does it cost now, and is that more or less than at first?"
    )
    answer = (
        f"After the rise it costs {price} × {1 + up / 100:.2f} = {float(first):.2f} dollars. The fall is taken from the new price: "
        f"{float(first):.2f} × {1 - down / 100:.2f} = {float(last):.2f} dollars.\n\n"
        f"That is {verdict} the {price} dollars at the beginning, because the two percentages refer to different amounts."
    )
    return question, answer


def _trains(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(PLACES, 2)
    u, v, hours = rng.randint(5, 14) * 10, rng.randint(5, 14) * 10, rng.randint(2, 9)
    distance = (u + v) * hours
    question = (
        f"{a} and {b} are joined by {distance} km of straight track in a puzzle. A train leaves {a} at {u} km/h, another leaves {b} at {v} km/h "
        "towards it at the same time. When do they meet, and how far from the first town?"
    )
    answer = (
        f"They approach each other at {u} + {v} = {u + v} km/h. To close {distance} km they need {distance} / {u + v} = {hours} hours.\n\n"
        f"In that time the first train covers {u} × {hours} = {u * hours} km, so they meet {hours} hours after leaving, {u * hours} km from {a}."
    )
    return question, answer


def _divisor(rng: random.Random) -> tuple[str, str]:
    g = rng.randint(2, 24)
    a, b = g * rng.randint(7, 60), g * rng.randint(7, 60)
    x, y, lines = max(a, b), min(a, b), []
    while y:
        lines.append(f"{x} = {x // y} · {y} + {x % y}")
        x, y = y, x % y
    steps = "\n".join(lines)
    answer = (
        f"Euclid's algorithm divides with remainder until nothing remains:\n\n{steps}\n\n"
        f"The last remainder that is not zero is {x}, so gcd({a}, {b}) = {x}."
    )
    return f"Compute the greatest common divisor of {a} and {b} and show the steps. What is the least common multiple?", (
        answer + f" The least common multiple is {a} · {b} / {x} = {math.lcm(a, b)}."
    )


def _mean(rng: random.Random) -> tuple[str, str]:
    values = [rng.randint(1, 60) for _ in range(rng.randint(5, 9))]
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = Fraction(ordered[middle] + ordered[~middle], 2)
    mean = Fraction(sum(values), len(values))
    answer = (
        f"1. The sum is {' + '.join(map(str, values))} = {sum(values)}. "
        f"There are {len(values)} values, so the mean is {sum(values)}/{len(values)} ≈ {float(mean):.2f}.\n"
        f"2. In order the values are {', '.join(map(str, ordered))}. The median is {float(median):g}.\n"
        f"3. The range is {ordered[-1]} - {ordered[0]} = {ordered[-1] - ordered[0]}."
    )
    return f"For the data {', '.join(map(str, values))}, find the mean, the median and the range.", answer


def _derivative(rng: random.Random) -> tuple[str, str]:
    a, b, c, n, at = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 20), rng.randint(3, 5), rng.randint(-2, 3)
    slope = a * n * at ** (n - 1) - 2 * b * at + c
    question = f"Let f(x) = {a}x^{n} - {b}x^2 + {c}x. Differentiate f and give the slope of its graph at x = {at}."
    answer = (
        f"Differentiate term by term with the power rule, (x^k)' = k·x^(k-1):\n\n$$f'(x) = {a * n}x^{{{n - 1}}} - {2 * b}x + {c}.$$\n\n"
        f"At x = {at}: $f'({at}) = {a * n}\\cdot({at})^{{{n - 1}}} - {2 * b}\\cdot({at}) + {c} = {slope}$. The slope there is {slope}."
    )
    return question, answer


def _dice(rng: random.Random) -> tuple[str, str]:
    target = rng.randint(3, 11)
    pairs = [(i, target - i) for i in range(1, 7) if 1 <= target - i <= 6]
    share = Fraction(len(pairs), 36)
    answer = (
        f"There are 6 · 6 = 36 equally likely outcomes. The sum is {target} for {', '.join(map(str, pairs))}: {len(pairs)} outcomes.\n\n"
        f"The probability is {len(pairs)}/36 = {share} ≈ {float(share):.3f}."
    )
    return f"Two fair dice are rolled. What is the probability that their sum is {target}?", answer


def _system(rng: random.Random) -> tuple[str, str]:
    x, y, a, b = rng.randint(-8, 9), rng.randint(-8, 9), rng.randint(2, 6), rng.randint(2, 6)
    s, t = x + y, a * x - b * y
    answer = (
        f"From the first equation y = {s} - x. Put this into the second: "
        f"{a}x - {b}({s} - x) = {t}, so {a + b}x - {b * s} = {t} and {a + b}x = {t + b * s}.\n\n"
        f"Hence x = {x} and y = {s} - ({x}) = {y}."
    )
    return f"Solve the system x + y = {s}, {a}x - {b}y = {t}.", answer


def _induction(rng: random.Random) -> tuple[str, str]:
    k, n = rng.randint(2, 9), rng.randint(10, 60)
    total = k * n * (n + 1) // 2
    question = f"Prove that {k} + {2 * k} + ... + {k}n = {k}n(n+1)/2 for every positive integer n, and evaluate the sum for n = {n}."
    answer = (
        f"For n = 1 both sides are {k}. Suppose the formula holds for some n. Adding the next term {k}(n+1) gives\n\n"
        f"{k}n(n+1)/2 + {k}(n+1) = {k}(n+1)(n + 2)/2,\n\nwhich is the formula for n + 1. By induction it holds for every n. "
        f"For n = {n} the sum is {k} · {n} · {n + 1} / 2 = {total}."
    )
    return question, answer


PROBLEMS: list[Callable[[random.Random], tuple[str, str]]] = [
    _shopping, _linear, _quadratic, _percent, _trains, _divisor, _mean, _derivative, _dice, _system, _induction,
]  # fmt: skip


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a place on a day.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "day": {"type": "string"}}, "required": ["place"]},
    },
}
CONVERT_TOOL = {
    "type": "function",
    "function": {
        "name": "convert_currency",
        "description": "Converts an amount from one currency to another.",
        "parameters": {
            "type": "object",
            "properties": {"amount": {"type": "number"}, "source": {"type": "string"}, "target": {"type": "string"}},
            "required": ["amount", "source", "target"],
        },
    },
}


def tool_calls(count: int) -> Iterator[tuple[list[Message], list[dict[str, Any]]]]:
    """(messages, tools): a request, the call, its result, the answer."""
    rng = random.Random("tools")
    days = ("today", "tomorrow", "on Saturday", "on Monday")
    skies = ("clear", "cloudy", "rain", "snow", "fog", "thunderstorms")
    for i in range(count):
        if rng.random() < 0.6:
            place, day, sky, degrees = rng.choice(PLACES), rng.choice(days), rng.choice(skies), rng.randint(-9, 34)
            ask = rng.choice(("What will the weather be like in {0} {1}?", "Do I need a coat in {0} {1}?", "How warm does it get in {0} {1}?"))
            arguments: dict[str, Any] = {"place": place, "day": day.removeprefix("on ")}
            name, result = "get_weather", {"place": place, "sky": sky, "high_celsius": degrees}
            question = ask.format(place, day)
            advice = "Take a warm coat." if degrees < 8 else "A light jacket will do." if degrees < 19 else "You will not need a coat."
            answer = f"In {place} it will be {degrees} °C with {sky} {day}. {advice}"
        else:
            amount, rate = rng.randint(2, 400) * 5, rng.randint(60, 160) / 100
            source, target = rng.sample(["EUR", "USD", "GBP", "CHF", "CAD", "AUD"], 2)
            name, arguments = "convert_currency", {"amount": amount, "source": source, "target": target}
            result = {"amount": round(amount * rate, 2), "currency": target, "rate": rate}
            question = f"How much is {amount} {source} in {target}?"
            answer = f"At a rate of {rate:.2f}, {amount} {source} are {amount * rate:.2f} {target}."
        call = {"id": f"call{i:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        yield (
            [
                {"role": "system", "content": "You are a helpful assistant. Call a tool when it gives you what you cannot know."},
                {"role": "user", "content": question},
                {"role": "assistant", "content": "Let me look that up.", "tool_calls": [call]},
                {"role": "tool", "name": name, "tool_call_id": call["id"], "content": json.dumps(result, ensure_ascii=False)},
                {"role": "assistant", "content": answer},
            ],
            [WEATHER_TOOL, CONVERT_TOOL],
        )


def chores(count: int) -> Iterator[list[Message]]:
    """Extraction to JSON, tables, sorting and rewriting, under a system message as deployments have them."""
    rng = random.Random("chores")
    systems = (
        "You are a careful assistant. Answer briefly and exactly.",
        "You turn text into data. Reply with valid JSON and nothing else when you are asked for JSON.",
        "You are an office assistant. Be polite and precise.",
    )
    for _ in range(count):
        name, other = rng.sample(NAMES, 2)
        place, thing = rng.choice(PLACES), rng.choice(THINGS)
        count_, price, day = rng.randint(2, 90), rng.randint(3, 60), rng.randint(1, 28)
        month = rng.choice(MONTHS)
        note = f"{name} from {place} ordered {count_} {thing} on {day} {month} at ${price} a piece and asks {other} to have them delivered."
        record = {"customer": name, "city": place, "item": thing, "quantity": count_, "unit_price": price, "total": count_ * price}
        record["date"] = f"{day} {month}"
        table = "| field | value |\n| --- | --- |\n" + "\n".join(f"| {key} | {value} |" for key, value in record.items())
        words = rng.sample([*THINGS, *PLACES], rng.randint(5, 9))
        mail = (
            f"Dear {name},\n\nthank you for your order of {count_} {thing} on {day} {month}. The total is ${count_ * price}. "
            f"{other} will arrange the delivery to {place} and let you know the day.\n\nKind regards"
        )
        numbered = "\n".join(f"{i}. {word}" for i, word in enumerate(sorted(words, key=str.lower), 1))
        tasks = [
            (f"Extract the order as JSON.\n\n{note}", "```json\n" + json.dumps(record, indent=2, ensure_ascii=False) + "\n```"),
            ("Show it as a Markdown table.", table),
            ("Write a short reply to the customer.", mail),
            (f"Sort these words alphabetically and number them: {', '.join(words)}.", numbered),
            (f"Write the words in reverse order, separated by semicolons: {', '.join(words)}.", "; ".join(reversed(words))),
        ]
        chosen = tasks[: rng.randint(2, 3)] if rng.random() < 0.6 else rng.sample(tasks[3:], rng.randint(1, 2))
        messages: list[Message] = [{"role": "system", "content": rng.choice(systems)}] if rng.random() < 0.5 else []
        for question, answer in chosen:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield messages
