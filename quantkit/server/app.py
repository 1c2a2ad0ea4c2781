"""The app: routes, and the form of every error."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from quantkit import __version__
from quantkit.errors import BusyError, EngineError
from quantkit.runtime.engine_thread import CLOSED, EngineThread
from quantkit.server import errors
from quantkit.server.body_limit import BodyLimit
from quantkit.server.openai import chat, completions, models
from quantkit.server.served import Served


def create_app(thread: EngineThread, names: Sequence[str] = ()) -> FastAPI:
    """An app that serves the thread's model; who made the thread ends it.

    Args:
        names: what clients may call the model; its own name by default.
    """
    app = FastAPI(title="quantkit", version=__version__, docs_url=None, redoc_url=None)
    app.state.served = Served(thread, names or [thread.engine.loaded.name])
    app.add_middleware(BodyLimit)
    errors.install(app)
    for room in (completions, chat, models):
        app.include_router(room.router)

    @app.get("/health")
    async def health() -> Response:
        """200 while requests are taken, else 503 and why."""
        if not thread.is_alive:
            raise EngineError(thread.error)
        if thread.is_draining:
            raise BusyError(CLOSED)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus' text format."""
        return Response(request.app.state.served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app
