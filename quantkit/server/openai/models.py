"""GET /v1/models: what is served, under every name it goes by, and its adapters."""

from __future__ import annotations

from fastapi import APIRouter, Request

from quantkit.server.openai.responses import ModelCard, ModelList
from quantkit.server.served import Served

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    served: Served = request.app.state.served
    return ModelList(data=[_card(served, name) for name in (*served.names, *served.adapters)])


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> ModelCard:
    served: Served = request.app.state.served
    return _card(served, served.name_of(name))


def _card(served: Served, name: str) -> ModelCard:
    is_adapter, engine = name in served.adapters, served.thread.engine
    return ModelCard(
        id=name,
        created=served.created,
        root=served.adapters[name] if is_adapter else engine.loaded.name,
        parent=served.names[0] if is_adapter else None,
        max_model_len=engine.scheduler.max_length,
    )
