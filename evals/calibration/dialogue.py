"""Instructions and conversations made of what people really asked and answered in documentation, and of documented code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from cleaning import from_rst, from_source, tidy
from prose import PYTHON, entries

Turns = list[str]


def questions(roots: dict[str, Path]) -> Iterator[tuple[str, Turns]]:
    """FAQs: a heading that asks, and the text below it."""
    files = [("python", path) for path in sorted((roots["python"] / PYTHON / "faq").glob("*.rst.txt"))]
    files += [("django", path) for path in sorted((roots["django"] / "docs/faq").glob("*.txt"))]
    files += [("sqlalchemy", path) for path in sorted((roots["sqlalchemy"] / "doc/build/faq").glob("*.rst"))]
    for origin, path in files:
        for heading, body in _sections(from_rst(path.read_text(encoding="utf-8"))):
            question = heading.strip("#").strip().replace("`", "")
            if 150 < len(body) < 6_000:
                yield origin, [question if question.endswith("?") else f"{question}?", body]


def how_tos(roots: dict[str, Path]) -> Iterator[tuple[str, Turns]]:
    """A guide's section as the answer to what its headings promise."""
    files = [("django", "Django", path) for path in sorted((roots["django"] / "docs").glob("howto/**/*.txt"))]
    files += [("django", "Django", path) for path in sorted((roots["django"] / "docs").glob("topics/**/*.txt"))]
    files += [("flask", "Flask", path) for path in sorted((roots["flask"] / "docs").glob("**/*.rst"))]
    files += [("sqlalchemy", "SQLAlchemy", path) for path in sorted((roots["sqlalchemy"] / "doc/build/orm").glob("*.rst"))]
    files += [("python", "Python", path) for path in sorted((roots["python"] / PYTHON / "howto").glob("*.rst.txt"))]
    asks = (
        "I am working with {0}. Can you explain this to me: {1}?",
        "{1} in {0}: how does it work? Please show an example.",
        "Write a short section of a guide to {0} on the topic “{1}”.",
        "What should I know about {1} when I use {0}?",
    )
    for origin, what, path in files:
        for i, (heading, body) in enumerate(_sections(from_rst(path.read_text(encoding="utf-8")))):
            topic = heading.strip("#").strip().replace("`", "")
            if 700 < len(body) < 4_000 and "```" in body and len(topic) > 8:
                yield origin, [asks[i % len(asks)].format(what, topic), body]


def _sections(text: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"(?m)^(#+ .+)$", _hide_fences(text))
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        yield heading, body.replace("\0", "#").strip()


def _hide_fences(text: str) -> str:
    """Comments of fenced code begin like headings."""
    return re.sub(r"```.*?```", lambda m: m[0].replace("#", "\0"), text, flags=re.S)


def library_functions(roots: dict[str, Path]) -> Iterator[tuple[str, Turns]]:
    """ "What does this function do?" with the reference's own answer."""
    for path in sorted((roots["python"] / PYTHON / "library").glob("*.rst.txt")):
        module = path.name.removesuffix(".rst.txt")
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"(?m)^\.\. function:: (([\w.]+)\(.*\))\n((?:[ \t]+.*\n|\n)+)", text):
            name = match[2] if "." in match[2] or module in ("functions",) else f"{module}.{match[2]}"
            body = from_rst(re.sub(r"(?m)^ {3}", "", match[3]))
            body = re.sub(r"\.\. \w+::.*", "", body).strip()
            if 350 < len(body) < 3_000:
                yield "python", [f"What does the Python function `{name}` do? Its signature is `{match[1]}`.", body]


def python_functions(roots: dict[str, Path]) -> Iterator[tuple[str, Turns]]:
    """A documented function: its docstring's summary as the task, its code as the answer."""
    for origin, pattern in (("networkx", "networkx/**/*.py"), ("django", "django/utils/*.py"), ("sympy", "sympy/ntheory/*.py"),
                            ("sympy", "sympy/utilities/*.py"), ("mpmath", "mpmath/libmp/*.py"), ("sympy", "sympy/combinatorics/*.py")):  # fmt: skip
        for path in sorted(roots[origin].glob(pattern)):
            if "/tests/" in path.as_posix():
                continue
            source = path.read_text(encoding="utf-8")
            for node in ast.parse(source).body:
                if not isinstance(node, ast.FunctionDef):
                    continue
                doc = ast.get_docstring(node) or ""
                body = ast.get_source_segment(source, node) or ""
                summary = re.sub(r"\s+", " ", doc.split("\n\n")[0])
                if len(summary) > 25 and 300 < len(body) < 4_000:
                    task = f"Write a Python function `{node.name}({ast.unparse(node.args)})`. {from_rst(summary).strip()}"
                    yield origin, [task, f"```python\n{tidy(body)}```"]


def javascript_functions(roots: dict[str, Path]) -> Iterator[tuple[str, Turns]]:
    for path in sorted(roots["lodash"].glob("[a-z]*.js")):
        text = path.read_text(encoding="utf-8")
        match = re.search(r"/\*\*\n(.*?)\*/\n((?:function|var) .*?\n\}\)?;?)\n", text, flags=re.S)
        if not match or len(text) > 8_000:
            continue
        comment = re.sub(r"(?m)^ \* ?", "", match[1])
        summary = re.sub(r"\s+", " ", comment.split("\n@")[0]).strip()
        example = re.search(r"@example\n+(.*)", comment, flags=re.S)
        if len(summary) > 40:
            answer = f"```javascript\n{match[2]}\n```"
            answer += f"\n\nFor example:\n\n```javascript\n{example[1].strip()}\n```" if example else ""
            yield "lodash", [f"Write a JavaScript function `{path.stem}`. {summary}", answer]


def lint_rules(roots: dict[str, Path]) -> Iterator[tuple[str, Turns]]:
    """A rule's purpose as the task and its implementation as the answer."""
    for path in sorted((roots["eslint"] / "lib/rules").glob("*.js")):
        text = path.read_text(encoding="utf-8")
        description = re.search(r'description:\s*"([^"]+)"', text)
        body = from_source(text)
        if description and len(body) < 6_000:
            yield "eslint", [f"Implement an ESLint rule `{path.stem}`: {description[1][0].lower()}{description[1][1:]}.", f"```javascript\n{body}```"]


def words(roots: dict[str, Path]) -> Iterator[tuple[str, Turns]]:
    for article in entries(roots["jargon"], "jargon"):
        head, _, body = article.partition("\n\n")
        word = re.split(r" /| n\.| v\.| adj| \(|,", head)[0].strip()
        if 250 < len(body) < 2_500 and 2 < len(word) < 40:
            yield "jargon", [f"What do hackers mean by “{word}”?", body]
