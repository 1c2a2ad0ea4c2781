"""Source files of many hands in nine languages, whole where they are small, otherwise in long parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from cleaning import from_source, pieces

FILES: list[tuple[str, str, str]] = [
    ("python", "django", "django/**/*.py"),
    ("python", "networkx", "networkx/algorithms/**/*.py"),
    ("python", "sqlalchemy", "lib/sqlalchemy/**/*.py"),
    ("python", "flask", "src/flask/*.py"),
    ("python", "sympy", "sympy/*/*.py"),
    ("go", "go", "usr/share/go-1.19/src/*/*.go"),
    ("go", "go", "usr/share/go-1.19/src/container/*/*.go"),
    ("go", "go", "usr/share/go-1.19/src/net/http/*.go"),
    ("javascript", "eslint", "lib/**/*.js"),
    ("javascript", "django", "django/contrib/**/*.js"),
    ("typescript", "rxjs", "src/internal/**/*.ts"),
    ("rust", "regex", "usr/share/cargo/registry/regex-1.7.1/src/**/*.rs"),
    ("c++", "fmt", "usr/include/fmt/*.h"),
    ("c", "stb", "usr/include/stb/stb_*.h"),
    ("html", "django", "django/contrib/*/templates/**/*.html"),
    ("css", "django", "django/contrib/**/*.css"),
]
SHARES = {"python": 34, "go": 14, "javascript": 13, "typescript": 10, "rust": 9, "c++": 8, "c": 8, "html": 2, "css": 2}


def programs(roots: dict[str, Path], language: str) -> Iterator[tuple[str, str]]:
    for name, origin, pattern in FILES:
        if name != language:
            continue
        for path in sorted(roots[origin].glob(pattern)):
            relative = path.relative_to(roots[origin]).as_posix()
            if path.is_file() and not re.search(r"/tests/|locale|tables?\.go|/vendor/|\.min\.|generated|zoneinfo|data\.py|_test\.go$", relative):
                yield from ((origin, part) for part in _parts(path.read_text(encoding="utf-8")))


def _parts(text: str) -> Iterator[str]:
    text = from_source(text)
    if re.search(r"Code generated|DO NOT EDIT", text[:400]) or len(text) < 600:
        return
    for part in pieces(text, 14_000):
        longest = max(map(len, part.split("\n")))
        digits = sum(c.isdigit() for c in part) / len(part)
        if longest < 240 and digits < 0.08 and len(part) > 600 and "OTHER DEALINGS" not in part:
            yield part
