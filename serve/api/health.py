"""What operators and orchestrators ask: alive, ready, which version, how is it going."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from serve.api import openapi
from serve.api.served import ServedModels
from serve.errors import EngineError

RenderMetrics = Callable[[], tuple[bytes, str]]


class Status(BaseModel):
    status: str


def routes(
    models: ServedModels, render_metrics: RenderMetrics, versions: Mapping[str, str]
) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses=openapi.answers(Status, 503))
    async def health() -> Status:
        """200 while every engine's thread answers."""
        if not models.is_alive:
            raise EngineError("The engine is dead", "engine_dead")
        return Status(status="ok")

    @router.get("/ready", responses=openapi.answers(Status, 503))
    async def ready() -> Status:
        """200 while new requests are welcome: a model is loaded, and the server is not draining."""
        if not models.is_ready:
            raise EngineError("No model is loaded, or the server is draining", "draining")
        return Status(status="ready")

    @router.get("/version", responses=openapi.answers(dict[str, str]))
    async def version() -> dict[str, str]:
        """The server's version, and those of what it stands on."""
        return dict(versions)

    @router.get("/metrics", response_class=Response, responses=openapi.text())
    async def metrics() -> Response:
        """For Prometheus."""
        body, content_type = render_metrics()
        return Response(body, headers={"content-type": content_type})

    return router
