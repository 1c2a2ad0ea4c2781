"""Training rows: documents of a mixture, packed into rows of context + 1 tokens, with each token's weight in the loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from . import generator
from .generator import Piece

BOS, EOS = "<|bos|>", "<|eos|>"
CHATS = "prompts_responses.jsonl"
HELD_OUT = ("valid", "test", "PROVENANCE", "LICENSE", "multilingual", "code")


@dataclass(frozen=True)
class Mixture:
    """Share of the tokens that each kind of document gets; whatever the folder of texts lacks goes to generated prose."""

    questions: float = 0.50
    lookups: float = 0.0
    problems: float = 0.20
    chat_problems: float = 0.03
    texts: float = 0.16
    stories: float = 0.10
    chats: float = 0.01

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


class Stream:
    """Endless packed rows. Kinds are drawn so that their shares hold in tokens, whatever the length of their documents."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        folder: Path | None,
        mixture: Mixture,
        *,
        context: int,
        seed: int,
        aids: float,
        subjects: tuple[str, ...] = (),
    ) -> None:
        self.tokenizer, self.mixture, self.context = tokenizer, mixture, context
        self.rng = random.Random(seed)
        self.kinds: dict[str, Callable[[], list[Piece]]] = {
            "questions": lambda: generator.question_document(self.rng, aids=aids, subjects=subjects),
            "lookups": lambda: generator.lookup_document(self.rng),
            "problems": lambda: generator.problem_document(self.rng),
            "chat_problems": lambda: generator.chat_document(self.rng),
            "stories": self._generated_prose,
            "texts": self._shuffled(texts(folder) if folder else []),
            "chats": self._shuffled(chats(folder) if folder else []),
        }
        self.drawn = dict.fromkeys(self.kinds, 1.0)
        self.ids: list[int] = []
        self.weights: list[float] = []

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

    def _append_document(self) -> None:
        shares = {f.name: getattr(self.mixture, f.name) for f in fields(self.mixture)}
        kind = min((name for name, share in shares.items() if share), key=lambda name: self.drawn[name] / shares[name])
        pieces = self.kinds[kind]()
        encoded = self._encode(piece.text for piece in pieces)
        ids = [self.tokenizer.bos_token_id, *(i for part in encoded for i in part), self.tokenizer.eos_token_id]
        self.ids += ids
        self.weights += [0.0, *(p.weight for p, part in zip(pieces, encoded, strict=True) for _ in part), 0.3]
        self.drawn[kind] += len(ids)

    def _encode(self, parts: Iterable[str]) -> list[list[int]]:
        return self.tokenizer(list(parts), add_special_tokens=False, verbose=False)["input_ids"]

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and loss weights, both [rows, context + 1]."""
        need = rows * (self.context + 1)
        while len(self.ids) < need:
            self._append_document()
        ids, self.ids = self.ids[:need], self.ids[need:]
        weights, self.weights = self.weights[:need], self.weights[need:]
        return torch.tensor(ids).view(rows, -1), torch.tensor(weights).view(rows, -1)
