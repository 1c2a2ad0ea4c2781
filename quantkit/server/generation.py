"""One HTTP request's way through the engine: its deltas timed and counted, its end when the client goes."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request

from quantkit.errors import EngineError
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.stream import Delta, Stream
from quantkit.server.errors import ApiError
from quantkit.server.metrics import Metrics


class Generation:
    """An async iterator of deltas, of all prompts of a request.

    Args:
        started: when the request came, of time.monotonic().
    """

    def __init__(self, stream: Stream, metrics: Metrics, started: float) -> None:
        self._stream, self._metrics, self._started = stream, metrics, started
        self._first: dict[tuple[int, int], float] = {}
        self._last: dict[tuple[int, int], float] = {}
        self._num_tokens: dict[tuple[int, int], int] = {}
        self._num_open = sum(len(output.completions) for output in stream.outputs)

    @property
    def outputs(self) -> list[RequestOutput]:
        return self._stream.outputs

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        """Raises RequestError or ApiError when a continuation fails, by its request or by the model; EngineError when the engine does."""
        delta = await self._stream.__anext__()
        self._watch(delta)
        if delta.error is not None:
            raise ApiError(500, str(delta.error), code="generation_failed") if isinstance(delta.error, EngineError) else delta.error
        return delta

    async def finish(self, request: Request) -> list[RequestOutput] | None:
        """The whole outputs, or None when the client has gone before."""
        whole, gone = asyncio.ensure_future(self._drain()), asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            return await whole if whole.done() else None
        finally:
            whole.cancel()
            gone.cancel()
            self.close()

    def close(self) -> None:
        """Give up what has not ended; more than once is no error."""
        self._stream.close()
        self._metrics.finished["abort"].inc(self._num_open)
        self._num_open = 0

    async def _drain(self) -> list[RequestOutput]:
        async for _ in self:
            pass
        return self.outputs

    def _watch(self, delta: Delta) -> None:
        now, key = time.monotonic(), (delta.prompt, delta.index)
        if delta.token_ids:
            if key not in self._first:
                self._first[key] = now
                self._metrics.first_token.observe(now - self._started)
            else:
                self._metrics.inter_token.observe((now - self._last[key]) / len(delta.token_ids))
            self._last[key] = now
            self._num_tokens[key] = self._num_tokens.get(key, 0) + len(delta.token_ids)
        if delta.finish_reason is not None:
            self._end(key, now, delta.finish_reason)

    def _end(self, key: tuple[int, int], now: float, reason: str) -> None:
        self._num_open -= 1
        self._metrics.finished["abort" if reason == "cancelled" else reason].inc()
        self._metrics.whole.observe(now - self._started)
        if self._num_tokens.get(key, 0) > 1:
            self._metrics.per_token.observe((now - self._first[key]) / (self._num_tokens[key] - 1))


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
