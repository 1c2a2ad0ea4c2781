"""How both kinds of generation are answered: as a stream of events, whole, or not at all where the client has gone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from fastapi import Request, Response
from pydantic import BaseModel

from quantkit.runtime.outputs import RequestOutput
from quantkit.server.generation import Generation
from quantkit.server.openai.event_stream import EventStream

CLIENT_GONE = 499


class Answer(Protocol):
    """One response, whole or in chunks."""

    def whole(self, outputs: list[RequestOutput]) -> BaseModel: ...

    def chunks(self, generation: Generation) -> AsyncIterator[BaseModel]: ...


async def respond(request: Request, generation: Generation, answer: Answer, *, stream: bool) -> Response:
    if stream:
        return EventStream(answer.chunks(generation), generation)
    outputs = await generation.finish(request)
    if outputs is None:
        return Response(status_code=CLIENT_GONE)
    return Response(answer.whole(outputs).model_dump_json(), media_type="application/json")
