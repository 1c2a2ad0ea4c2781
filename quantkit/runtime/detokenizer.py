"""Token ids to text as they come, and the strings that end it: nothing is shown that a later token could still take back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

_BROKEN = "\ufffd"
_TAIL = 12
"""Tokens of the prompt that decide how the first token is written, as with or without a space."""
_LONGEST = 4
"""Tokens of one character at most, each of a byte."""
_AMID = 8
"""Tokens that may have begun a character which is not whole yet."""


class TextStream:
    """The text of one continuation, made when it is asked for; where there are strings that stop it, with every token.

    Text that was shown stays. So bytes of no character, which sentencepiece writes otherwise once it sees those behind them, can stand in the text of
    one who looked early otherwise than in the text of all tokens at once.

    Args:
        tokenizer: a transformers tokenizer with a fast backend.
        prompt: the prompt's ids.
        stop: strings that end the text; it is cut before the first of them.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._before, self._pending = self._parted(list(prompt[-_TAIL:]), is_cut=len(prompt) > _TAIL)
        self._begun = self._decode(self._before + self._pending) if self._pending else None
        self._stop = tuple(stop)
        self._raw = ""
        self._shown = 0
        self.stopped_by: str | None = None

    def push(self, token: int, *, may_stop: bool = True) -> None:
        """One more token; where it may not stop yet, stop strings are text like any other."""
        self._pending.append(token)
        if self._stop:
            self._read()
            if may_stop:
                self._look_for_stop()
            self._shown = max(self._shown, len(self._raw) - (self._held() if may_stop and not self.stopped_by else 0))

    def catch_up(self) -> str:
        """All text that is certain now."""
        if not self._stop:
            self._read()
            self._shown = len(self._raw)
        return self._raw[: self._shown]

    def finish(self) -> str:
        """All of the text: with what was held back for a stop string that did not come, and bytes that never became a character."""
        if self.stopped_by is None:
            self._read(is_last=True)
            self._look_for_stop()
        self._shown = len(self._raw)
        return self._raw

    def _parted(self, tail: list[int], *, is_cut: bool) -> tuple[list[int], list[int]]:
        """The end of a prompt from the beginning of a character on, and tokens of a character that it only begins."""
        for begun in range(min(_LONGEST, len(tail) + 1)):
            end = len(tail) - begun
            for start in range(_LONGEST if is_cut else 1):
                text = self._decode(tail[start:end])
                if not (is_cut and text.startswith(_BROKEN)) and not self._is_open(tail[start:end], text):
                    return tail[start:end], tail[end:]
        return tail, []

    def _read(self, *, is_last: bool = False) -> None:
        """Append what the pending tokens add, but for the last of them that are part of a character."""
        if not self._pending:
            return
        before, num_whole = self._decode(self._before), len(self._pending)
        after = self._decode(self._before + self._pending)
        while not is_last and len(self._pending) - num_whole < _AMID and self._is_open(self._pending[:num_whole], after):
            num_whole -= 1
            if not num_whole:
                return
            after = self._decode(self._before + self._pending[:num_whole])
        if self._begun is not None and after.startswith(self._begun):  # the prompt's own character never became whole
            before = self._begun
        self._begun = None
        new = after[len(before) :]
        self._raw += new
        read, self._pending = self._pending[:num_whole], self._pending[num_whole:]
        if new:
            self._before = read
        elif not before:  # tokens without a text do not tell how the next one is written
            self._before = (self._before + read)[-_TAIL:]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _is_open(self, ids: list[int], text: str) -> bool:
        """Whether tokens, whose text ends so, end in the middle of a character."""
        return text.endswith(_BROKEN) and not any(ids[-len(own) :] == own for own in self._written_broken)

    @cached_property
    def _written_broken(self) -> list[list[int]]:
        """Tokens of the character that stands for broken ones, where somebody means it."""
        ids = self._backend.encode(_BROKEN, add_special_tokens=False).ids
        return [own for own in (ids, ids[1:]) if own and self._decode(own) == _BROKEN]

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
