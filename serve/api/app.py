"""Put the endpoints together. Knows the models it is given, and not where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from fastapi import FastAPI

from serve.api import completions, errors, health, models
from serve.api.middleware import HttpObserver, RequestMiddleware
from serve.api.openapi import DescribedAPI
from serve.api.served import ServedModel, ServedModels

__all__ = ["ServedModel", "ServedModels", "create_app"]


def _not_observed(route: str, status: int, seconds: float) -> None:
    """For servers that nobody watches."""


def _own_version() -> dict[str, str]:
    try:
        return {"version": metadata.version("dlight-serve")}
    except metadata.PackageNotFoundError:  # run from a checkout
        return {"version": "unknown"}


def create_app(
    served: ServedModels,
    render_metrics: health.RenderMetrics,
    observe_http: HttpObserver = _not_observed,
    versions: Mapping[str, str] | None = None,
) -> FastAPI:
    """The ASGI application. Engines are started, drained and stopped by the caller.

    render_metrics: the body of /metrics and its content type. observe_http: called once a request
    with route template, status and seconds. versions: what /version says.
    """
    versions = versions or _own_version()
    app = DescribedAPI(
        title="dlight-serve",
        version=versions.get("version", "unknown"),
        docs_url=None,  # these two load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect is no answer that OpenAI's clients understand
    )
    app.include_router(completions.routes(served))
    app.include_router(models.routes(served))
    app.include_router(health.routes(served, render_metrics, versions))
    errors.install(app)
    app.add_middleware(RequestMiddleware, observe=observe_http)
    return app
