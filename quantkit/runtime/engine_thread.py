"""A thread around the engine, for callers in event loops: requests in through an inbox, tokens out through a queue for each caller.

Only the thread touches the engine. Whoever waits is woken, nobody polls. When a step fails, every caller gets an EngineError and the thread is dead.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from quantkit.errors import BusyError, EngineError
from quantkit.runtime.engine import Engine
from quantkit.runtime.matcher import Matcher
from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.runtime.stream import Stream

_log = logging.getLogger("quantkit")
CLOSED = "the server is shutting down and takes no more requests"


@dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine was doing after its last step; counters are since its start."""

    num_running: int = 0
    num_waiting: int = 0
    cache_usage: float = 0.0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_not_finite: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


class EngineThread:
    """Runs an engine that nobody else touches from now on."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.state = EngineState()
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: set[Stream] = set()
        self._stream_of: dict[str, tuple[Stream, int]] = {}  # by the engine's request id, with the prompt's number
        self._error: str | None = None
        self._is_draining = self._is_stopping = False
        self._ids = count()
        self._thread = threading.Thread(target=self._run, name="quantkit-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._error is None and self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def error(self) -> str:
        """Why it is not alive."""
        return self._error or "the engine has stopped"

    async def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, priority: int = 0, tenant: str = "", salt: str = "",
        lora: str | None = None, matcher: Matcher | None = None, is_live: bool = True,
    ) -> Stream:  # fmt: skip
        """Start generating for all of the prompts, given as token ids, or for none of them.

        Args:
            matcher: of the parameters' structure, compiled by the caller so that no step waits for it.
            is_live: whether text is wanted as it comes; else the outputs have it in the end.

        Raises:
            RequestError: there are more prompts than may wait, or the engine refuses one or the parameters.
            BusyError: the queue is full, or the engine ends its work.
            EngineError: the engine is dead.
        """
        self.engine.require_places(len(prompts))
        stream = Stream(asyncio.get_running_loop(), self._cancel, is_live=is_live)
        start = partial(self.engine.add, params=params, priority=priority, tenant=tenant, salt=salt, lora=lora, matcher=matcher)
        add = partial(self._add, stream, prompts, start)
        with self._wake:
            if self._is_draining:
                raise BusyError(CLOSED)
            if not self.is_alive:
                raise EngineError(self.error)
            self._open.add(stream)
            self._inbox.append(add)
            self._wake.notify_all()
        await stream.wait_for_admission()
        return stream

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those that are on their way; whether they all ended in time (in seconds)."""
        with self._wake:
            self._is_draining = True
            return self._wake.wait_for(lambda: not self._open or not self.is_alive, timeout)

    def stop(self) -> None:
        """End the thread; who still waits gets a BusyError, as another server may take the request."""
        with self._wake:
            self._is_draining = self._is_stopping = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_jobs():
                outputs = self.engine.step() if self.engine.has_work else []
                self._publish()  # before anybody can ask about what they were told
                self._tell(outputs)
            self._die(BusyError, "the server shut down before this was done")
        except BaseException as error:  # whatever ends the thread, nobody may be left waiting
            _log.critical("the engine failed and takes no more requests", exc_info=error)
            self._die(EngineError, f"the engine failed: {type(error).__name__}: {error}")

    def _take_jobs(self) -> bool:
        """Wait for something to do and do what the callers left; False at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._inbox or self._is_stopping or self.engine.has_work)
            jobs, self._inbox = self._inbox, deque()
            is_stopping = self._is_stopping
        for job in jobs:
            job()
        return not is_stopping

    def _add(self, stream: Stream, prompts: Sequence[Sequence[int]], start: Callable[..., RequestOutput]) -> None:
        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt in prompts:
                request_id = f"request-{next(self._ids)}"
                outputs[request_id] = start(prompt, request_id=request_id)
        except Exception as error:  # of this request alone: the engine keeps nothing of one that it did not take
            for request_id in outputs:
                self.engine.cancel(request_id)
            self._close(stream)
            stream.fail(error)
            return
        stream.admit(list(outputs.values()))
        self._stream_of |= {request_id: (stream, prompt) for prompt, request_id in enumerate(outputs)}

    def _cancel(self, stream: Stream) -> None:
        """Of any thread: end a stream's requests and free what they hold."""
        with self._wake:
            if stream in self._open:
                self._inbox.append(partial(self._abandon, stream))
                self._wake.notify_all()

    def _abandon(self, stream: Stream) -> None:
        for output in stream.outputs:
            self.engine.cancel(output.id)
            self._stream_of.pop(output.id, None)
        self._close(stream)

    def _tell(self, outputs: list[RequestOutput]) -> None:
        """Hand each caller what a step brought."""
        for output in outputs:
            stream, prompt = self._stream_of[output.id]
            if stream.is_live:
                self.engine.catch_up(output.id)
            deltas = [delta for each in output.completions if (delta := stream.news(prompt, each)) is not None]
            if output.is_finished:
                del self._stream_of[output.id]
            if stream.is_finished:
                self._close(stream)
            stream.send(deltas)

    def _close(self, stream: Stream) -> None:
        with self._wake:
            self._open.discard(stream)
            self._wake.notify_all()

    def _die(self, kind: type[BusyError] | type[EngineError], message: str) -> None:
        """Nothing runs any more: every caller gets an error of this kind."""
        with self._wake:
            self._error = message
            streams, self._open = list(self._open), set()
            self._inbox.clear()
            self._wake.notify_all()
        for stream in streams:
            stream.fail(kind(message))

    def _publish(self) -> None:
        scheduler, stats = self.engine.scheduler, self.engine.stats
        self.state = EngineState(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            cache_usage=scheduler.pool.num_used / len(scheduler.pool),
            num_prompt_tokens=stats.num_prompt_tokens,
            num_generated_tokens=stats.num_generated_tokens,
            num_cached_tokens=stats.num_cached_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_not_finite=stats.num_not_finite,
            num_drafted=stats.num_drafted,
            num_accepted=stats.num_accepted,
        )

