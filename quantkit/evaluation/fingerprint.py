"""What decides what a model says: its weights, configuration and tokenizer, as one number."""

from __future__ import annotations

import hashlib
from pathlib import Path

from quantkit.checkpoint.digest import content_digest

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tiktoken.model", "chat_template.jinja",
              "generation_config.json")  # fmt: skip


def model_fingerprint(folder: Path) -> str:
    """sha256 over configuration, tokenizer and weights."""
    digest = hashlib.sha256(content_digest(folder).encode())
    for name in _TOKENIZER:
        path = folder / name
        digest.update(f"\0{name}\0".encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()
