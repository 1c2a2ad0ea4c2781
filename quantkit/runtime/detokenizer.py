"""Token ids to text as they come, and the strings that end it: nothing is shown that a later token could still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_BROKEN = "\ufffd"
_TAIL = 8
"""Tokens of the prompt that decide how the first token is written, as with or without a space."""


class TextStream:
    """The text of one continuation.

    Args:
        tokenizer: a transformers tokenizer with a fast backend.
        prompt: the prompt's ids.
        stop: strings that end the text; it is cut before the first of them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._tail = list(prompt[-_TAIL:])
        if self._decode(self._tail).endswith(_BROKEN):  # the stream would take the whole tail for part of a character that is to come
            self._tail = []
        self._ids: list[int] = []
        self._stream = DecodeStream(ids=self._tail, skip_special_tokens=True)
        self._stop = tuple(stop)
        self._raw = ""
        self._shown = 0
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """Everything that has been shown."""
        return self._raw[: self._shown]

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that is certain now; where it may not stop yet, stop strings are text like any other."""
        self._ids.append(token)
        self._raw += self._decoded(token)
        if not may_stop:
            return self._show(len(self._raw))
        self._look_for_stop()
        return self._show(len(self._raw) - (0 if self.stopped_by else self._held()))

    def finish(self) -> str:
        """The rest: what was held back for a stop string that did not come, and bytes that never became a character."""
        if self.stopped_by is None:
            whole = self._decode(self._tail + self._ids)[len(self._decode(self._tail)) :]
            self._raw = whole if whole.startswith(self._raw) else self._raw
            self._look_for_stop()
        return self._show(len(self._raw))

    def _decoded(self, token: int) -> str:
        """What one more token adds. Bytes of no character can change how the ones before them are written; then it starts anew behind them."""
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception:  # tokenizers has no kind of its own for it
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._backend, token) or ""

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _look_for_stop(self) -> None:
        """Cut at the earliest stop string; one that begins in text already shown is impossible, as that would have been held back."""
        found = [(at, stop) for stop in self._stop if (at := self._raw.find(stop, self._shown)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self._raw = self._raw[:at]

    def _held(self) -> int:
        """The length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        tail = self._raw[max(self._shown, len(self._raw) - longest) :] if longest else ""
        return next((len(tail) - i for i in range(len(tail)) if any(stop.startswith(tail[i:]) for stop in self._stop)), 0)

    def _show(self, until: int) -> str:
        new = self._raw[self._shown : until]
        self._shown = max(self._shown, until)
        return new
