"""The model behind the routes: its engine's thread, the names it goes by, its tokenizer off the event loop, its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quantkit.errors import did_you_mean
from quantkit.runtime.engine_thread import EngineThread
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.server.errors import ApiError
from quantkit.server.generation import Generation
from quantkit.server.metrics import Metrics
from quantkit.server.openai.token_texts import TokenTexts

T = TypeVar("T")


class Served:
    """Everything a request needs.

    Args:
        names: what clients may call the model; the first one is what it answers with where they name none.
    """

    def __init__(self, thread: EngineThread, names: Sequence[str]) -> None:
        self.thread, self.names = thread, tuple(names)
        self.metrics = Metrics(thread, self.names[0])
        self.texts = TokenTexts(thread.engine.tokenizer)
        self.created = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="quantkit-tokenizer")

    def name_of(self, model: str | None) -> str:
        """Raises ApiError: there is no such model."""
        if model is None or model in self.names:
            return model or self.names[0]
        raise ApiError(404, f"there is no model {model[:200]!r}; {did_you_mean(model[:200], self.names)}", param="model", code="model_not_found")

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Run what uses the tokenizer beside the event loop: long prompts and chat templates take their time."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, started: float) -> Generation:
        """Raises RequestError, EngineError: nothing was started."""
        return Generation(await self.thread.submit(prompts, params), self.metrics, started)
