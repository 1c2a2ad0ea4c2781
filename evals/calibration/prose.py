"""Stories, plays, essays and expository documentation."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from cleaning import from_html, from_rst, pieces, tidy

GO_OPTICKS = "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
PYTHON = "usr/share/doc/python3.11/html/_sources"
SQLITE_ESSAYS = (  # noqa: SIM905
    "about aff_short affcase1 appfileformat arch atomiccommit autoinc backup cintro compile datatype3 different eqp errlog faq fasterthanfs "
    "features flextypegood floatingpoint foreignkeys fts5 gencol howitworks howtocorrupt inmemorydb intern-v-extern-blob isolation json1 "
    "lang_aggfunc lang_conflict lang_createindex lang_createtable lang_expr lang_select lang_transaction lang_upsert lang_with limits "
    "lockingv3 malloc mmap np1queryprob nulls onefile optoverview partialindex pragma qmplan queryplanner queryplanner-ng quirks "
    "rowidtable rowvalue security selfcontained serverless sharedcache speed stricttables tempfiles testing transactional unlock_notify "
    "uri useovernet vtab wal walformat whentouse whyc windowfunctions withoutrowid zeroconf"
).split()
POSTGRESQL_CHAPTERS = (
    "tutorial-", "mvcc-", "transaction-iso", "explicit-locking", "applevel-", "planner-", "using-explain", "performance-tips", "populate",
    "indexes-", "ddl-", "dml-", "queries-", "wal-", "routine-", "backup-", "continuous-", "warm-", "high-", "hot-", "different-",
    "overview", "query-path", "parser-stage", "rule-system", "executor", "connect-estab", "geqo", "textsearch-", "plpgsql-", "xfunc-",
    "rules-", "datatype-", "functions-", "typeconv-", "parallel-", "role-", "storage-", "btree-", "gin-", "gist-", "brin-", "auth-",
)  # fmt: skip


def books(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Passages of about two thousand words, whole paragraphs, unwrapped where the source breaks its lines."""
    for novel in _austen(roots["austen"]):
        yield from (("austen", part) for part in pieces(unwrap(novel), 11_000))
    opticks = (roots["go"] / GO_OPTICKS).read_text(encoding="utf-8")
    body = re.sub(r"\[(Sidenote|Illustration)[^\]]*\]|\[\d+\]", "", opticks[opticks.index("SIR ISAAC NEWTON'S ADVERTISEMENTS") :]).replace("_", "")
    body = re.sub(r"(?m)^\s*FOOTNOTES:?\s*$", "", body)
    yield from (("go", part) for part in pieces(unwrap(body), 11_000))
    texts = roots["brotli"] / "tests" / "testdata"
    alice = (texts / "alice29.txt").read_text(encoding="latin-1")
    yield from (("brotli", part) for part in pieces(unwrap(alice[alice.index("CHAPTER I") :]).replace("`", "‘"), 11_000))
    milton = (texts / "plrabn12.txt").read_text(encoding="latin-1")
    verses = re.sub(r"(?m)^ +", "", milton)
    yield from (("brotli", tidy(part)) for part in _by_lines(verses, 8_000))
    yield from (("brotli", part) for part in _by_lines(play(texts / "asyoulik.txt"), 9_000))


def _austen(root: Path) -> Iterator[str]:
    """The novels lie in an R database: zlib streams, each one serialized vector of strings, a line a string."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    offset = 0
    while offset < len(data):
        stream = zlib.decompressobj()
        vector = stream.decompress(data[offset + 4 :])
        offset = len(data) - len(stream.unused_data)
        (count,) = struct.unpack_from(">i", vector, 27)  # behind the header, the encoding's name and the vector's type
        lines, at = [], 31
        for _ in range(count):
            (length,) = struct.unpack_from(">i", vector, at + 4)
            lines.append(vector[at + 8 : at + 8 + max(length, 0)].decode("utf-8"))
            at += 8 + max(length, 0)
        yield "\n".join(lines)


def unwrap(text: str) -> str:
    """Lines broken at a column -> one line a paragraph."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\x1a", ""))
    joined = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs)
    return "\n\n".join(paragraph for paragraph in joined if paragraph and not set(paragraph) <= set("* -_"))


def play(path: Path) -> str:
    """A play whose speakers stand before a tab."""
    text = path.read_text(encoding="latin-1")
    text = text[text.index("ACT I") :]
    text = re.sub(r"\tAS YOU LIKE IT\n|\n+(?=\t\S)", "\n", text)
    text = re.sub(r"(?m)^([A-Z][A-Z ]+)\t", r"\n\1: ", text)
    return tidy(re.sub(r"(?m)^\t+", "", text))


def _by_lines(text: str, size: int) -> Iterator[str]:
    part: list[str] = []
    length = 0
    for line in text.split("\n"):
        part.append(line)
        length += len(line) + 1
        if length >= size and (not line.strip() or line.endswith((".", "!", "?"))):
            yield "\n".join(part) + "\n"
            part, length = [], 0


def dictionaries(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for name, file in (("devil", "devil"), ("jargon", "jargon")):
        for part in pieces("\n\n".join(entries(roots[name], file)), 6_000):
            yield name, part


def entries(root: Path, name: str) -> list[str]:
    """The articles of a dictd dictionary, in the order of its file."""
    text = gzip.decompress((root / f"usr/share/dictd/{name}.dict.dz").read_bytes()).decode("utf-8", errors="replace")
    found = []
    for line in (root / f"usr/share/dictd/{name}.index").read_text(encoding="utf-8").splitlines():
        word, *place = line.split("\t")
        if word.startswith("00"):
            continue
        offset, length = (sum(BASE64.index(c) * 64**i for i, c in enumerate(reversed(number))) for number in place[:2])
        found.append((offset, length))
    data = text.encode("utf-8")
    articles = (data[offset : offset + length].decode("utf-8", errors="ignore") for offset, length in sorted(set(found)))
    return [_article(article) for article in articles if len(article) > 120]


BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def _article(text: str) -> str:
    text = re.sub(r"\{\s*([^}]*?)\s*\}", lambda m: re.sub(r"\s+", " ", m[1]), text)
    paragraphs = re.split(r"\n\s*\n", text.strip())
    head, *rest = [paragraph.strip() for paragraph in paragraphs]
    return "\n\n".join([re.sub(r"\s*\n\s*", " ", head), *(re.sub(r"\s*\n\s*", " ", paragraph) for paragraph in rest)])


def expository(roots: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Documentation written to be read: tutorials, guides, essays; references and tables left out."""
    python = roots["python"] / PYTHON
    for folder in ("tutorial", "howto", "reference", "extending"):
        for path in sorted((python / folder).glob("*.rst.txt")):
            if path.stem not in ("index.rst", "clinic.rst", "changelog.rst"):
                yield from (("python", part) for part in pieces(from_rst(path.read_text(encoding="utf-8")), 12_000))
    for folder in ("intro", "topics", "howto", "misc"):
        for path in sorted((roots["django"] / "docs" / folder).rglob("*.txt")):
            if path.stem != "index":
                yield from (("django", part) for part in pieces(from_rst(path.read_text(encoding="utf-8")), 12_000))
    for path in sorted([*(roots["sqlalchemy"] / "doc/build/tutorial").glob("*.rst"), *(roots["sqlalchemy"] / "doc/build/orm").glob("*.rst")]):
        yield from (("sqlalchemy", part) for part in pieces(from_rst(path.read_text(encoding="utf-8")), 12_000))
    for path in sorted((roots["flask"] / "docs").rglob("*.rst")):
        if path.stem not in ("index", "changes", "license", "api"):
            yield from (("flask", part) for part in pieces(from_rst(path.read_text(encoding="utf-8")), 12_000))
    for name in SQLITE_ESSAYS:
        path = roots["sqlite"] / f"usr/share/doc/sqlite3/{name}.html"
        if path.exists():
            yield from (("sqlite", part) for part in pieces(from_html(path.read_text(encoding="utf-8")), 12_000))
    for path in sorted((roots["postgresql"] / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        if path.name.startswith(POSTGRESQL_CHAPTERS):
            yield from (("postgresql", part) for part in pieces(from_html(path.read_text(encoding="utf-8")), 12_000))
