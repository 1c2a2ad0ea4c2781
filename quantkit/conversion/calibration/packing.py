"""Documents -> rows of token ids.

Every piece of a document in a row begins with what the tokenizer puts before a text (BOS, once) and at position 0, so that no piece
attends to another. A document that does not fit its row goes on in the next row as a new piece.

A long document gives a row's worth and waits until every other document had its turn: otherwise few rows would hold few documents, and a
language that the tokenizer spells in bytes would crowd out the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from quantkit.conversion.calibration.chat import NotAConversation, render
from quantkit.conversion.calibration.documents import Document

CHAT_FALLBACK = "conversations were written as plain 'Role: text' paragraphs: "
MIN_PIECE = 16  # a document's rest shorter than this is left out rather than carried to the next row
TOKENIZE_BATCH = 64


@dataclass(slots=True)
class Encoder:
    """Documents -> ids without the prefix, lazily and in batches; counts what it drops and remembers what must be said."""

    tokenizer: Any
    dropped: Counter[str]
    notes: list[str] = field(default_factory=list)
    prefix: list[int] = field(init=False)
    suffix: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.prefix, self.suffix = special_ends(self.tokenizer)

    def encode(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        stream = iter(documents)
        while batch := list(islice(stream, TOKENIZE_BATCH)):
            texts, are_chats = [], []
            for document in batch:
                try:
                    texts.append(self._text(document))
                    are_chats.append(document.messages is not None)
                except NotAConversation as reason:
                    self.dropped[str(reason)] += 1
            if not texts:
                continue
            encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            for ids, is_chat in zip(encoded, are_chats, strict=True):
                ids = self._ends(list(ids), is_chat=is_chat)
                if ids:
                    yield ids
                else:
                    self.dropped["no tokens"] += 1

    def _text(self, document: Document) -> str:
        if document.messages is None:
            return document.text or ""
        rendered = render(self.tokenizer, document.messages, document.tools)
        note = rendered.plain and CHAT_FALLBACK + rendered.plain
        if note and note not in self.notes:
            self.notes.append(note)
        return rendered.text

    def _ends(self, ids: list[int], *, is_chat: bool) -> list[int]:
        """Without the prefix, which a chat template or the text itself may have brought; with the suffix, unless a template ended it."""
        size = len(self.prefix)
        while size and ids[:size] == self.prefix:
            ids = ids[size:]
        if ids and self.suffix and not is_chat and ids[-len(self.suffix) :] != self.suffix:
            ids = ids + self.suffix
        return ids


def special_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids before, ids behind) every text, as the tokenizer itself adds them."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def in_turns(documents: Iterable[Sequence[int]], limit: int) -> Iterator[tuple[int, Sequence[int]]]:
    """(document's number, its next `limit` ids): the first part of every document, then the second of those that have one, ..."""
    rests: list[tuple[int, Sequence[int]]] = []
    for number, document in enumerate(documents):
        yield number, document[:limit]
        if len(document) - limit >= MIN_PIECE:
            rests.append((number, document[limit:]))
    while rests:
        yield from ((number, rest[:limit]) for number, rest in rests)
        rests = [(number, rest[limit:]) for number, rest in rests if len(rest) - limit >= MIN_PIECE]


@dataclass(slots=True)
class Rows:
    """Rows of ids, and the lengths of the pieces in each, padding left out."""

    ids: list[list[int]] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)
    num_documents: int = 0
    num_seen: int = 0  # tokens of all documents taken, prefixes included

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.pieces))


def pack(documents: Iterable[Sequence[int]], prefix: list[int], num_rows: int, seq_len: int) -> Rows:
    """Rows filled to the last token; a last row that stays unfilled is left out."""
    rows = Rows()
    row: list[int] = []
    pieces: list[int] = []
    in_row: set[int] = set()
    used: set[int] = set()
    for number, part in in_turns(documents, max(seq_len - len(prefix), 1)):
        rest = part
        rows.num_seen += len(prefix) + len(rest)
        while rest:
            room = seq_len - len(row)
            piece = [*prefix, *rest[: max(room - len(prefix), 0)]][:room]
            rest = rest[max(len(piece) - len(prefix), 0) :]
            row += piece
            pieces.append(len(piece))
            in_row.add(number)
            if len(row) < seq_len:
                continue
            rows.ids.append(row)
            rows.pieces.append(pieces)
            used |= in_row
            row, pieces, in_row = [], [], set()
            if len(rows.ids) == num_rows:
                rows.num_documents = len(used)
                return rows
            if len(rest) < MIN_PIECE:
                break
    rows.num_documents = len(used)
    return rows


def pad(documents: Iterable[Sequence[int]], prefix: list[int], num_rows: int, seq_len: int) -> Rows:
    """One document a row, cut to `seq_len`; the caller pads what is shorter."""
    rows = Rows()
    for document in islice(documents, num_rows):
        ids = [*prefix, *document][:seq_len]
        rows.num_seen += len(prefix) + len(document)
        rows.ids.append(ids)
        rows.pieces.append([len(ids)])
        rows.num_documents += 1
    return rows


def pad_id(tokenizer: Any) -> int:
    """What fills a row behind its documents: pad, else eos, else 0. It is never valid, so it is never measured."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0
