"""What every request gets: an id, a measurement, a line in the log, an answer if all else fails.

Pure ASGI: Starlette's BaseHTTPMiddleware hides the client's disconnect and costs time a chunk.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import access, errors
from serve.errors import EngineError, RequestError

log = logging.getLogger(__name__)
texts = logging.getLogger("serve.texts")

# (route template, HTTP status, seconds from the request's head to the end of its answer)
HttpObserver = Callable[[str, int, float], None]

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """`observe` is called once a request, also for one that nobody waited for (status 499).

    `routes`: the app's. A HEAD is answered as a GET; the server leaves the body out.
    """

    def __init__(self, app: ASGIApp, observe: HttpObserver, routes: Sequence[BaseRoute]) -> None:
        self._app, self._observe, self._routes = app, observe, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, method, request_id = time.perf_counter(), scope["method"], _request_id(scope)
        known = access.begin(scope, request_id.decode())
        if method == "HEAD":
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                known.status, known.is_started = message["status"], True
                headers = [*message["headers"], (b"x-request-id", request_id)]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            seconds, route = time.perf_counter() - start, self._route(scope)
            self._observe(route, known.status, seconds)
            known.write(method, route, seconds)

    def _route(self, scope: Scope) -> str:
        """The template, of which there are few, and never the path, which the client chooses.

        Also where a request would have gone that was refused on its way.
        """
        found = scope.get("route") or next(
            (route for route in self._routes if route.matches(scope)[0] != Match.NONE), None
        )
        return getattr(found, "path", "unknown")


class ErrorMiddleware:
    """Renders what the app did not, and what the middleware below this one raises."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if scope["type"] != "http":
                raise
            if not access.of(scope).is_started:
                error = EngineError("The server is shutting down", "draining")
                await errors.render(error)(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            known = access.of(scope)
            if known.is_started:  # all that can still be done is to break the connection off
                log.error("request %s broke off", known.request_id)
                raise
            await errors.render(error)(scope, receive, send)


class Cors(CORSMiddleware):
    """Starlette's, which refuses a preflight in plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        return errors.render(RequestError("Pages of this origin may not do this", "origin"))


class TextLog:
    """Logs what clients send and what they are answered, in full. For those who ask for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        asked, answered = bytearray(), bytearray()

        async def read() -> Message:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def write(message: Message) -> None:
            answered.extend(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, read, write)
        finally:
            fields = {
                "request_id": access.of(scope).request_id,
                "request": asked.decode(errors="replace"),
                "answer": answered.decode(errors="replace"),
            }
            texts.info("texts", extra={"fields": fields})


def _request_id(scope: Scope) -> bytes:
    """The caller's, if sane; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value)
    return uuid.uuid4().hex.encode()
