"""Mathematics explained: guides of computer algebra, algorithms with their reasoning, and worked problems."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from cleaning import from_rst, pieces, tidy

SYMPY_FOLDERS = ("tutorials", "guides", "explanation", "modules")


def explained(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for folder in SYMPY_FOLDERS:
        for path in sorted((roots["sympy"] / "doc/src" / folder).rglob("*")):
            if path.suffix in (".rst", ".md") and path.stat().st_size > 3_000 and "deprecat" not in path.name:
                text = path.read_text(encoding="utf-8")
                text = from_rst(text) if path.suffix == ".rst" else tidy(re.sub(r"\{[\w:]+\}`~?\.?([^`]*)`", r"`\1`", text))
                yield from (("sympy", part) for part in pieces(text, 10_000))
    for path in sorted((roots["mpmath"] / "docs").rglob("*.rst")):
        if path.stat().st_size > 3_000:
            yield from (("mpmath", part) for part in pieces(from_rst(path.read_text(encoding="utf-8")), 10_000))


def docstrings(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Long docstrings of mathematical functions: definition, properties, examples with results."""
    for name, pattern in (("sympy", "sympy/**/*.py"), ("mpmath", "mpmath/**/*.py"), ("networkx", "networkx/algorithms/**/*.py")):
        for path in sorted(roots[name].glob(pattern)):
            if "/tests/" in path.as_posix():
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    doc = ast.get_docstring(node) or ""
                    if len(doc) > 1_500 and ">>>" in doc:
                        yield name, tidy(f"# {node.name}\n\n" + from_rst(doc))
