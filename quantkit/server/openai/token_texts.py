"""What single tokens are called in log-probabilities. Tokens need not be whole characters, so their bytes are what is exact."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Bytes and text of each token of a tokenizer; without one, tokens go by their ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset()
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        self.bytes_of = lru_cache(maxsize=65536)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """Part of a character is written as OpenAI does: bytes:\\xe2\\x80."""
        raw = self.bytes_of(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def length_of(self, token: int) -> int:
        """Characters that begin in the token; special tokens are no part of the text."""
        return 0 if token in self._special else sum(byte & 0xC0 != 0x80 for byte in self.bytes_of(token))

    def decode(self, tokens: list[int]) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _bytes_of(self, token: int) -> bytes:
        piece = None if self._tokenizer is None else self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # ids above the tokenizer's fill up the model's vocabulary
            return f"token_id:{token}".encode()
        if token in self._special:
            return piece.encode()
        if self._is_byte_level and all(character in _BYTE_LEVEL for character in piece):
            return bytes(_BYTE_LEVEL[character] for character in piece)
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace("▁", " ").encode()


def _byte_level() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()
