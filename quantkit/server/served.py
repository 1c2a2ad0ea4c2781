"""The model behind the routes: its engine's thread, the names it goes by, its adapters, what is slow kept off the event loop, its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quantkit.errors import UsageError, did_you_mean
from quantkit.runtime.engine_thread import EngineThread
from quantkit.runtime.matcher import Matcher
from quantkit.runtime.sampling_params import SamplingParams
from quantkit.server.errors import ApiError
from quantkit.server.generation import Generation
from quantkit.server.metrics import Metrics
from quantkit.server.openai.form import Form, naming
from quantkit.server.openai.token_texts import TokenTexts

T = TypeVar("T")


class Served:
    """Everything a request needs.

    Args:
        names: what clients may call the model; the first one is what it answers with where they name none.

    Attributes:
        adapters: their folders by the names that clients call them by, as if each were a model.

    Raises:
        UsageError: an adapter has a name of the model's.
    """

    def __init__(self, thread: EngineThread, names: Sequence[str]) -> None:
        self.thread, self.names, self.adapters = thread, tuple(names), thread.engine.options.lora
        require_distinct(self.names, self.adapters)
        self.metrics = Metrics(thread, self.names[0])
        self.texts = TokenTexts(thread.engine.tokenizer)
        self.created = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="quantkit-tokenizer")

    def name_of(self, model: str | None) -> str:
        """Raises ApiError: there is no such model."""
        known = (*self.names, *self.adapters)
        if model is None or model in known:
            return model or self.names[0]
        raise ApiError(404, f"there is no model {model[:200]!r}; {did_you_mean(model[:200], known)}", param="model", code="model_not_found")

    async def tokenize(self, work: Callable[[], T]) -> T:
        """Run what uses the tokenizer beside the event loop: long prompts and chat templates take their time."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, started: float, *, model: str | None, form: Form | None, is_live: bool
    ) -> Generation:
        """Raises ApiError, RequestError, EngineError: nothing was started."""
        matcher = None if form is None else await self._compiled(form)
        lora = model if model in self.adapters else None
        stream = await self.thread.submit(prompts, params, lora=lora, matcher=matcher, is_live=is_live)
        return Generation(stream, self.metrics, started)

    async def _compiled(self, form: Form) -> Matcher:
        """Compiled beside the event loop and the engine, neither of which waits for it."""
        with naming(form.field):
            compiler = await self.tokenize(lambda: self.thread.engine.compiler)
            return await compiler.compile_beside(form.structure)


def require_distinct(names: Iterable[str], adapters: Iterable[str]) -> None:
    """Raises UsageError where an adapter has a name of the model's."""
    if both := sorted(set(names) & set(adapters)):
        raise UsageError(f"{both[0]!r} is a name of the model and of an adapter; give the adapter another one")
