"""POST /v1/chat/completions: a conversation through the model's own chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request, Response

from quantkit.runtime.outputs import RequestOutput
from quantkit.runtime.sampler import TokenLogprobs
from quantkit.runtime.stream import Delta
from quantkit.server.generation import Generation
from quantkit.server.openai.logprobs import chat_logprobs
from quantkit.server.openai.protocol import ChatRequest
from quantkit.server.openai.respond import respond
from quantkit.server.openai.responses import AnswerMessage, ChatChunk, ChatCompletion, ChatLogprobs, DeltaChoice, MessageChoice, Usage
from quantkit.server.served import Served

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def chat(body: ChatRequest, request: Request) -> Response:
    started = time.monotonic()
    served: Served = request.app.state.served
    answer, params = _Answer(body, served), body.params()
    prompt = await served.tokenize(lambda: served.thread.engine.encode_chat([message.turn for message in body.messages]))
    generation = await served.generate([prompt], params, started, model=body.model, form=body.form, is_live=bool(body.stream))
    return await respond(request, generation, answer, stream=bool(body.stream))


class _Answer:
    """One response, whole or in chunks."""

    def __init__(self, body: ChatRequest, served: Served) -> None:
        self._body, self._texts = body, served.texts
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name_of(body.model)}

    def whole(self, outputs: list[RequestOutput]) -> ChatCompletion:
        choices = [
            MessageChoice(
                index=c.index,
                message=AnswerMessage(content=c.text),
                logprobs=self._logprobs(c.logprobs),
                finish_reason=c.finish_reason,
                stop_reason=c.stop_reason,
            )
            for c in outputs[0].completions
        ]
        return ChatCompletion(**self._head, choices=choices, usage=Usage.of(outputs))

    async def chunks(self, generation: Generation) -> AsyncIterator[ChatChunk]:
        opening = {"role": "assistant", "content": ""}
        yield ChatChunk(**self._head, choices=[DeltaChoice(index=index, delta=opening) for index in range(self._body.n or 1)])
        async for delta in generation:
            yield ChatChunk(**self._head, choices=[self._choice(delta)])
        if self._body.includes_usage:
            yield ChatChunk(**self._head, choices=[], usage=Usage.of(generation.outputs))

    def _choice(self, delta: Delta) -> DeltaChoice:
        return DeltaChoice(
            index=delta.index,
            delta={"content": delta.text} if delta.text or not delta.finish_reason else {},
            logprobs=self._logprobs(delta.logprobs),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        return None if entries is None else chat_logprobs(entries, self._texts)
