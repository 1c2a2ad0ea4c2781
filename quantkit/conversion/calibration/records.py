"""Files -> records (dicts), one reader a file kind, none of which reads more than its budget of bytes.

What a record means (text, turns, threads) is `documents.py`'s business. Every broken file is refused with its name and the place.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import CalibrationError

Record = dict[str, Any]
NUM_STRETCHES = 16  # a file beyond its budget is read in this many places, evenly spread, so that its order does not matter
WHOLE_JSON_LIMIT = 1 << 30
TEXT_SEPARATOR = "<|endoftext|>"
SECTION = 32_768  # characters after which a long text is cut at its next good place


@dataclass(slots=True)
class Budget:
    """How many bytes may still be read, and what was said about files that hold more."""

    bytes_left: int
    notes: list[str] = field(default_factory=list)

    def partly(self, path: Path, how: str) -> None:
        self.notes.append(f"{path.name} was read in part: {how}")


def read_records(path: Path, budget: Budget, rng: random.Random) -> Iterator[Record]:
    """The records of one file. Raises CalibrationError for a kind that is not known."""
    kind = file_kind(path)
    if kind is None:
        raise CalibrationError(f"{path}: unknown kind of calibration file; known: {', '.join(sorted(READERS))} (all but parquet also with .gz)")
    return _or_bad_gzip(path, READERS[kind](path, budget, rng))


def _or_bad_gzip(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    try:
        yield from records
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} is not a whole gzip file: {error}") from error


def file_kind(path: Path) -> str | None:
    """The suffix that decides the reader, None when there is no reader for it."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in READERS and (path.suffix != ".gz" or suffix.lower() != ".parquet") else None


def _stretches(path: Path, budget: Budget) -> Iterator[tuple[int, BinaryIO, int]]:
    """(offset, file positioned there, bytes to read): the whole file when the budget allows, else evenly spread parts of it."""
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            yield 0, file, budget.bytes_left  # type: ignore[misc]
            if file.read(1):
                budget.partly(path, "its beginning")
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= budget.bytes_left:
            yield 0, file, size
            return
        length = max(budget.bytes_left // NUM_STRETCHES, 1)
        for i in range(NUM_STRETCHES):
            offset = size * i // NUM_STRETCHES
            file.seek(offset)
            yield offset, file, length
    budget.partly(path, f"{budget.bytes_left / 1e6:.0f} of {size / 1e6:.0f} MB, from {NUM_STRETCHES} places")


def _decode(path: Path, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        hint = "it begins like UTF-16; save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") and offset == 0 else "save it as UTF-8"
        raise CalibrationError(f"{path} is not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); {hint}") from error


def _read_text(path: Path, budget: Budget, rng: random.Random) -> Iterator[Record]:
    """Documents lie between <|endoftext|>; without one the file is one long document, handed on in sections cut at blank lines."""
    for offset, file, length in _stretches(path, budget):
        data = file.read(length)
        start = 0
        while offset and start < len(data) and data[start] & 0xC0 == 0x80:
            start += 1
        end = len(data)
        if length == end and file.peek(1):  # type: ignore[attr-defined]
            end -= _unfinished_tail(data)
        text = _decode(path, data[start:end], offset + start).replace("\r\n", "\n")
        for document in text.split(TEXT_SEPARATOR):
            yield from ({"text": section} for section in sections(document))


def _unfinished_tail(data: bytes) -> int:
    """How many bytes at the end begin a character that the data does not finish."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return back if needed > back else 0
    return 0


def sections(text: str) -> Iterator[str]:
    """The text in pieces of about SECTION characters, cut behind a blank line, a line or a word; their join is the text."""
    start = 0
    while len(text) - start > SECTION * 3 // 2:
        cut = -1
        for mark in ("\n\n", "\n", " "):
            cut = text.rfind(mark, start + SECTION // 2, start + SECTION)
            if cut >= 0:
                cut += len(mark)
                break
        cut = cut if cut >= 0 else start + SECTION
        yield text[start:cut]
        start = cut
    yield text[start:]


def _lines(path: Path, budget: Budget) -> Iterator[tuple[str, str]]:
    """(where, line) of every whole line that is not blank."""
    for offset, file, length in _stretches(path, budget):
        position = offset
        if offset:
            position += len(file.readline())
        number, end = 0, offset + length
        while position < end and (line := file.readline()):
            number += 1
            text = _decode(path, line, position)
            where = f"line {number}" if offset == 0 else f"the line at byte {position}"
            position += len(line)
            if text.strip():
                yield where, text


def _read_jsonl(path: Path, budget: Budget, rng: random.Random) -> Iterator[Record]:
    for where, line in _lines(path, budget):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}: {where} is not JSON: {error.msg} at column {error.colno}") from error
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict):
            raise CalibrationError(f"{path}: {where} is a JSON {type(record).__name__}; every line must be an object")
        yield record


def _read_json(path: Path, budget: Budget, rng: random.Random) -> Iterator[Record]:
    """A list of objects, an object with one such list, or lines of JSON under the wrong name."""
    if path.stat().st_size > WHOLE_JSON_LIMIT:
        raise CalibrationError(f"{path} is one JSON document of {path.stat().st_size / 1e9:.1f} GB; give it as .jsonl, one object a line")
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        text = _decode(path, file.read(), 0)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            yield from _read_jsonl(path, budget, rng)
            return
        if not text.strip():
            return
        raise CalibrationError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        content = lists[0] if len(lists) == 1 and not _is_record(content) else [content]
    if not isinstance(content, list):
        raise CalibrationError(f"{path} holds a JSON {type(content).__name__}; a list of objects is needed")
    for number, record in enumerate(content):
        if isinstance(record, str):
            record = {"text": record}
        if not isinstance(record, dict):
            raise CalibrationError(f"{path}: element {number} is a JSON {type(record).__name__}; every element must be an object")
        yield record


def _is_record(content: Record) -> bool:
    return "messages" in content or "conversations" in content


def _read_parquet(path: Path, budget: Budget, rng: random.Random) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        groups = list(range(file.num_row_groups))
        if path.stat().st_size > budget.bytes_left:
            rng.shuffle(groups)
        num_bytes = num_rows = 0
        for batch in file.iter_batches(batch_size=256, row_groups=groups) if groups else ():
            yield from batch.to_pylist()
            num_bytes += batch.nbytes
            num_rows += batch.num_rows
            if num_bytes > budget.bytes_left and num_rows < file.metadata.num_rows:
                budget.partly(path, f"{num_rows} of {file.metadata.num_rows} rows, row groups in random order")
                return
    except (pa.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {error}") from error


def _read_csv(path: Path, budget: Budget, rng: random.Random) -> Iterator[Record]:
    """From the beginning only: a quoted field may hold line ends, so there is no safe place to jump to."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    num_bytes = 0
    csv.field_size_limit(1 << 27)
    try:
        with opener(path, "rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            for record in csv.DictReader(text):
                yield {name: value for name, value in record.items() if isinstance(name, str)}
                num_bytes += sum(len(value) for value in record.values() if isinstance(value, str))
                if num_bytes > budget.bytes_left:
                    budget.partly(path, "its beginning")
                    return
    except UnicodeDecodeError as error:
        with opener(path, "rb") as file:
            _decode(path, file.read(budget.bytes_left + (1 << 20)), 0)
        raise CalibrationError(f"{path} is not UTF-8; save it as UTF-8") from error
    except csv.Error as error:
        raise CalibrationError(f"{path} is not a readable CSV file: {error}") from error


READERS: dict[str, Callable[[Path, Budget, random.Random], Iterator[Record]]] = {
    ".txt": _read_text,
    ".text": _read_text,
    ".raw": _read_text,  # as wikitext's files are named
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}

ARTICLE_TITLE = re.compile(r"^\s*= [^=].*[^=] = *\n?$")


def join_articles(records: Iterator[Record]) -> Iterator[Record]:
    """wikitext's rows are lines; its documents are articles, which a title "= Title =" opens."""
    article: list[str] = []
    for record in records:
        line = record["text"]
        if ARTICLE_TITLE.match(line) and article:
            yield {"text": "".join(article)}
            article = []
        article.append(line)
    yield {"text": "".join(article)}
