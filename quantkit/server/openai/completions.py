"""POST /v1/completions: prompts of text or ids, many at once, with the prompt's own log-probabilities where they are echoed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampler import TokenLogprobs
from quantkit.runtime.stream import Delta
from quantkit.server.generation import Generation
from quantkit.server.openai.logprobs import legacy_logprobs
from quantkit.server.openai.protocol import CompletionRequest
from quantkit.server.openai.respond import respond
from quantkit.server.openai.responses import Completion, TextChoice, Usage
from quantkit.server.served import Served

router = APIRouter()


@router.post("/v1/completions", response_model=Completion)
async def complete(body: CompletionRequest, request: Request) -> Response:
    started = time.monotonic()
    served: Served = request.app.state.served
    answer, params = _Answer(body, served), body.params()
    prompts = await served.tokenize(lambda: [served.thread.engine.encode(prompt) for prompt in body.prompt])
    generation = await served.generate(prompts, params, started, model=body.model, form=body.form, is_live=bool(body.stream))
    return await respond(request, generation, answer, stream=bool(body.stream))


class _Answer:
    """One response, whole or in chunks. Choices are numbered prompt * n + index."""

    def __init__(self, body: CompletionRequest, served: Served) -> None:
        self._body, self._texts = body, served.texts
        self._n = body.n or 1
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name_of(body.model)}
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: list[RequestOutput]) -> Completion:
        choices = [
            self._choice(output, Delta(prompt, c.index, c.text, c.token_ids, c.logprobs, c.finish_reason, c.stop_reason))
            for prompt, output in enumerate(outputs)
            for c in output.completions
        ]
        return Completion(**self._head, choices=choices, usage=Usage.of(outputs))

    async def chunks(self, generation: Generation) -> AsyncIterator[Completion]:
        async for delta in generation:
            yield Completion(**self._head, choices=[self._choice(generation.outputs[delta.prompt], delta)])
        if self._body.includes_usage:
            yield Completion(**self._head, choices=[], usage=Usage.of(generation.outputs))

    def _choice(self, output: RequestOutput, delta: Delta) -> TextChoice:
        """What a delta says, behind the echoed prompt if it is the choice's first."""
        index = delta.prompt * self._n + delta.index
        text, tokens, entries = delta.text, list(delta.token_ids), list[TokenLogprobs | None](delta.logprobs or ())
        if self._body.echo and index not in self._offsets:
            text = self._prompt_text(delta.prompt, output) + text
            tokens, entries = output.prompt_ids + tokens, [*(output.prompt_logprobs or ()), *entries]
        offset, logprobs = self._offsets.get(index, 0), None
        if self._body.logprobs is not None:
            logprobs, offset = legacy_logprobs(tokens, entries, self._texts, offset)
        self._offsets[index] = offset
        return TextChoice(index=index, text=text, logprobs=logprobs, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)

    def _prompt_text(self, prompt: int, output: RequestOutput) -> str:
        given = self._body.prompt[prompt]
        return given if isinstance(given, str) else self._texts.decode(output.prompt_ids)
