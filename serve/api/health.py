"""What operators and orchestrators ask: alive, ready, which version, how is it going."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from serve.api.served import ServedModels

RenderMetrics = Callable[[], tuple[bytes, str]]


def routes(
    models: ServedModels, render_metrics: RenderMetrics, versions: Mapping[str, str]
) -> APIRouter:
    router = APIRouter()

    @router.get("/health", responses={503: {"description": "An engine is dead"}})
    async def health() -> Response:
        """200 while every engine's thread answers."""
        return _status(models.is_alive, "ok", "the engine is dead")

    @router.get("/ready", responses={503: {"description": "Send no requests here"}})
    async def ready() -> Response:
        """200 while new requests are welcome: a model is loaded, and the server is not draining."""
        return _status(models.is_ready, "ready", "no model is loaded, or the server is draining")

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The server's version, and those of what it stands on."""
        return dict(versions)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        body, content_type = render_metrics()
        return Response(body, headers={"content-type": content_type})

    return router


def _status(is_good: bool, good: str, bad: str) -> Response:
    if is_good:
        return JSONResponse({"status": good})
    return JSONResponse({"status": bad}, status_code=503)
