"""Training rows: documents of a mixture, packed into rows of context + 1 tokens, with each token's weight in the loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from . import generator
from .generator import Piece, Says

BOS, EOS = "<|bos|>", "<|eos|>"
CHATS = "prompts_responses.jsonl"
HELD_OUT = ("valid", "test", "PROVENANCE", "LICENSE", "multilingual", "code")


@dataclass(frozen=True)
class Mixture:
    """Share of the tokens that each kind of document gets; whatever the folder of texts lacks goes to generated prose."""

    questions: float = 0.45
    problems: float = 0.16
    chat_problems: float = 0.0
    texts: float = 0.32
    stories: float = 0.07
    chats: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Mixture:
        """`questions=0.6,texts=0.2`: named shares replace the defaults."""
        return cls(**{name: float(share) for name, share in (part.split("=") for part in text.split(",") if part)})


def texts(folder: Path) -> list[str]:
    """Every .txt and .utf8 file below `folder`, cut into short documents; files named as test or validation data are left out."""
    found: list[str] = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".txt", ".utf8") and not any(word in p.name for word in HELD_OUT)):
        found += _documents(_plain(path.read_text(encoding="utf-8", errors="ignore")))
    return found


def _plain(text: str) -> str:
    """Undo WikiText's spacing and TinyStories' separators."""
    for old, new in (("<|endoftext|>", "\n\n\n"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "one"), (" , ", ", "), (" . ", ". ")):
        text = text.replace(old, new)
    return text


def _documents(text: str, size: int = 1500) -> list[str]:
    """Paragraphs, or lines where a file has no paragraphs, joined up to about `size` characters; no document can crowd out the others."""
    documents, parts = [], []
    for line in text.replace("\n\n", "\n").split("\n"):
        if line.strip():
            parts.append(line.strip()[: 2 * size])
        if sum(map(len, parts)) > size:
            documents.append("\n".join(parts))
            parts = []
    return [d for d in [*documents, "\n".join(parts)] if len(d) > 80]


def chats(folder: Path) -> list[str]:
    """Short prompts and responses, in the form of the chat template."""
    rows = [json.loads(line) for path in sorted(folder.rglob(CHATS)) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        f"<|user|>{r['prompt']}<|end|><|assistant|>{r['response'][:1200]}<|end|>" for r in rows if len(r["prompt"]) < 400 and r["prompt"].isascii()
    ]


@dataclass
class Row:
    """Tokens of documents end to end, and hints as (place, layer, token or place looked at)."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    says: list[tuple[int, int, int]] = field(default_factory=list)
    looks: list[tuple[int, int, int]] = field(default_factory=list)

    def append(self, ids: list[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


class Batch(NamedTuple):
    """ids, weights: [rows, context + 1]. says, looks: [num, 4] of row, place, layer and token or place looked at; see hints.py."""

    ids: torch.Tensor
    weights: torch.Tensor
    says: torch.Tensor
    looks: torch.Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(each.to(device) for each in self))


class Stream:
    """Endless packed rows. Kinds are drawn so that their shares hold in tokens, whatever the length of their documents.

    Every row begins with a document, so that no question is cut off from its choices; what does not fit at a row's end is dropped.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        folder: Path | None,
        mixture: Mixture,
        *,
        context: int,
        seed: int,
        aids: float,
    ) -> None:
        self.tokenizer, self.mixture, self.context = tokenizer, mixture, context
        self.rng = random.Random(seed)
        self.kinds: dict[str, Callable[[], list[Piece]]] = {
            "questions": lambda: generator.question_document(self.rng, aids=aids),
            "problems": lambda: generator.problem_document(self.rng),
            "chat_problems": lambda: generator.chat_document(self.rng),
            "stories": self._generated_prose,
            "texts": self._shuffled(texts(folder) if folder else []),
            "chats": self._shuffled(chats(folder) if folder else []),
        }
        self.drawn = dict.fromkeys(self.kinds, 1.0)

    def _generated_prose(self) -> list[Piece]:
        return generator.prose_document(self.rng)

    def _shuffled(self, found: list[str]) -> Callable[[], list[Piece]]:
        """Every document once, then all again in another order."""
        if not found:
            return self._generated_prose
        waiting: list[str] = []

        def draw() -> list[Piece]:
            if not waiting:
                waiting.extend(self.rng.sample(found, len(found)))
            return [Piece(waiting.pop(), 1.0)]

        return draw

    def _append_document(self, row: Row) -> None:
        shares = {f.name: getattr(self.mixture, f.name) for f in fields(self.mixture)}
        kind = min((name for name, share in shares.items() if share), key=lambda name: self.drawn[name] / shares[name])
        pieces = self.kinds[kind]()
        start = len(row.ids)
        row.append([self.tokenizer.bos_token_id], 0.0)
        ends: list[int] = []
        for piece, ids in zip(pieces, self._encode([piece.text for piece in pieces]), strict=True):
            row.append(ids, piece.weight)
            ends.append(len(row.ids) - 1)
            for hint in piece.hints:
                if isinstance(hint, Says):
                    row.says.append((ends[-1], hint.depth, self._encode([hint.text])[0][-1]))
                else:
                    row.looks.append((ends[-1], hint.layer, start if hint.back is None else ends[-1 - hint.back]))
        row.append([self.tokenizer.eos_token_id], 0.3)
        self.drawn[kind] += len(row.ids) - start

    def _encode(self, parts: list[str]) -> list[list[int]]:
        return self.tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]

    def _row(self) -> Row:
        row = Row()
        while len(row.ids) <= self.context:
            self._append_document(row)
        return row

    def batch(self, rows: int) -> Batch:
        made = [self._row() for _ in range(rows)]
        length = self.context + 1
        hints = [
            torch.tensor([(i, *hint) for i, row in enumerate(made) for hint in getattr(row, name) if hint[0] < self.context]).view(-1, 4).long()
            for name in ("says", "looks")
        ]
        return Batch(torch.tensor([row.ids[:length] for row in made]), torch.tensor([row.weights[:length] for row in made]), *hints)
