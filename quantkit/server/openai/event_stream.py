"""Server-sent events: one JSON object a line, an error as the last one if need be, then [DONE]; when the client goes, the work ends."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from quantkit.server.errors import as_api_error
from quantkit.server.generation import Generation

_log = logging.getLogger("quantkit")


class EventStream(StreamingResponse):
    """Sends chunks as they come and closes the generation in the end, however it ends."""

    def __init__(self, chunks: AsyncIterator[BaseModel], generation: Generation) -> None:
        super().__init__(_lines(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _lines(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json()}\n\n"
    except Exception as error:  # the status is sent already, so a client can only read of it
        found = as_api_error(error)
        if found is not error and found.status == 500:
            _log.error("a stream failed", exc_info=error)
        yield f"data: {json.dumps(found.body)}\n\n"
    yield "data: [DONE]\n\n"
