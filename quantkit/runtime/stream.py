"""What one caller of the engine's thread reads: admission or refusal first, then news of every continuation until all have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from quantkit.errors import EngineError, RequestError
from quantkit.runtime.outputs import Completion, RequestOutput
from quantkit.runtime.sampler import TokenLogprobs
from quantkit.runtime.sequence import FinishReason


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step added to one continuation.

    Attributes:
        prompt: the number of the prompt among those submitted together.
        index: the continuation of that prompt.
        logprobs: one entry a token, where they were asked for.
        finish_reason: None while more is to come.
        error: why it failed, where finish_reason is "error".
    """

    prompt: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: RequestError | EngineError | None = None


_News = list[Delta] | BaseException | None


class Stream:
    """An async iterator of deltas. The engine's thread writes, the event loop that made it reads.

    Attributes:
        is_live: whether its deltas have text as it comes; else the last ones have it all.
        outputs: the requests by prompt. The engine fills them in ahead of the deltas; a prompt's log-probabilities are whole with its first delta.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, cancel: Callable[[Stream], None], *, is_live: bool) -> None:
        self.outputs: list[RequestOutput] = []
        self.is_live = is_live
        self._loop, self._cancel = loop, cancel
        self._arrived: asyncio.Queue[_News] = asyncio.Queue()
        self._ready: list[Delta] = []
        self._told: dict[tuple[int, int], tuple[int, int]] = {}  # tokens and characters
        self._ended: set[tuple[int, int]] = set()
        self._num_left: int | None = None

    async def wait_for_admission(self) -> None:
        """Raises what the engine refuses the request with. Who is cancelled here gives the request up."""
        try:
            await self._next()
        except asyncio.CancelledError:
            self.close()
            raise
        self._num_left = sum(len(output.completions) for output in self.outputs)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        """Raises EngineError when the engine fails on the way, BusyError when it is stopped."""
        if not self._num_left:
            raise StopAsyncIteration
        while not self._ready:
            self._ready = list(await self._next() or [])
        delta = self._ready.pop(0)
        self._num_left -= delta.finish_reason is not None
        return delta

    def close(self) -> None:
        """Give up what has not ended yet; more than once is no error."""
        self._cancel(self)

    async def _next(self) -> list[Delta] | None:
        news = await self._arrived.get()
        if isinstance(news, BaseException):
            self._num_left = 0
            raise news
        return news

    # The side of the engine's thread.

    @property
    def is_finished(self) -> bool:
        return len(self._ended) == sum(len(output.completions) for output in self.outputs)

    def news(self, prompt: int, completion: Completion) -> Delta | None:
        """What was not told yet of a continuation; None when there is nothing."""
        key = (prompt, completion.index)
        (told, shown), known = self._told.get(key, (0, 0)), len(completion.token_ids)
        text = completion.text[shown:]
        if key in self._ended or (told == known and not text and completion.finish_reason is None):
            return None
        self._told[key] = (known, shown + len(text))
        if completion.finish_reason is not None:
            self._ended.add(key)
        logprobs = None if completion.logprobs is None else completion.logprobs[told:known]
        ending = (completion.finish_reason, completion.stop_reason, completion.error)
        return Delta(prompt, completion.index, text, completion.token_ids[told:known], logprobs, *ending)

    def admit(self, outputs: list[RequestOutput]) -> None:
        self.outputs = outputs
        self._put(None)

    def send(self, deltas: list[Delta]) -> None:
        if deltas:
            self._put(deltas)

    def fail(self, error: BaseException) -> None:
        self._put(error)

    def _put(self, news: _News) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, news)
        except RuntimeError:  # the caller's loop is closed, so nobody reads any more
            self.close()
