"""Put the endpoints together. Knows the models it is given, and not where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from fastapi import FastAPI

from serve.api import admin as administration
from serve.api import chat, completions, errors, health, models, profiles, tokenize
from serve.api.admin import Admin
from serve.api.auth import Gate, Keys
from serve.api.body import BodyLimit
from serve.api.limits import Limits, RateLimiter
from serve.api.middleware import Cors, ErrorMiddleware, HttpObserver, RequestMiddleware, TextLog
from serve.api.openapi import DescribedAPI
from serve.api.served import ServedModel, ServedModels

__all__ = ["Keys", "Limits", "ServedModel", "ServedModels", "create_app"]


def _not_observed(route: str, status: int, seconds: float) -> None:
    """For servers that nobody watches."""


def _not_counted(reason: str) -> None:
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
    *,
    limits: Limits | None = None,
    api_keys: Keys | None = None,
    admin_keys: Keys | None = None,
    cors_origins: Sequence[str] = (),
    log_prompts: bool = False,
    on_rejected: Callable[[str], None] = _not_counted,
    admin: Admin | None = None,
) -> FastAPI:
    """The ASGI application. Engines are started, drained and stopped by the caller.

    render_metrics: the body of /metrics and its content type. observe_http: called once a request
    with route template, status and seconds. versions: what /version says. api_keys: without any,
    everybody may come in. cors_origins: web pages of these may. log_prompts: log every POST's body
    and answer. on_rejected: called with the reason why a request did not get to its endpoint.
    admin: what /admin and /v1/profiles act on; without it there are none.
    """
    versions = versions or _own_version()
    limits = limits or Limits()
    app = DescribedAPI(
        title="dlight-serve",
        version=versions.get("version", "unknown"),
        docs_url=None,  # these two load their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect is no answer that OpenAI's clients understand
    )
    app.state.limits = limits
    routers = [
        completions.routes(served),
        chat.routes(served),
        tokenize.routes(served),
        models.routes(served),
        health.routes(served, render_metrics, versions),
    ]
    if admin is not None:
        routers += [profiles.routes(admin), administration.routes(admin)]
    routes = [*app.routes]  # the document's
    for router in routers:
        app.include_router(router)
        routes += router.routes
    errors.install(app)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, on_rejected=on_rejected)
    app.add_middleware(
        Gate,
        api_keys=api_keys or Keys(),
        admin_keys=admin_keys or Keys(),
        limiter=_limiter(limits),
        on_rejected=on_rejected,
    )
    app.add_middleware(ErrorMiddleware)
    if log_prompts:
        app.add_middleware(TextLog)
    if cors_origins:
        app.add_middleware(
            Cors,
            allow_origins=cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestMiddleware, observe=observe_http, routes=routes)
    return app


def _limiter(limits: Limits) -> RateLimiter | None:
    if limits.requests_per_minute is None:
        return None
    return RateLimiter(limits.requests_per_minute, limits.burst)
