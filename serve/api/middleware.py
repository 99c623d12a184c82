"""What every request gets: an id, a measurement, and an answer even if all else fails.

Pure ASGI: Starlette's BaseHTTPMiddleware hides the client's disconnect and costs time a chunk.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import errors

log = logging.getLogger(__name__)

# (route template, HTTP status, seconds from the request's head to the end of its answer)
HttpObserver = Callable[[str, int, float], None]

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """`observe` is called once a request, also for one that nobody waited for (status 499)."""

    def __init__(self, app: ASGIApp, observe: HttpObserver) -> None:
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        answer = _Answer(send, _request_id(scope))
        try:
            await self._respond(scope, receive, answer)
        finally:
            self._observe(_route(scope), answer.status, time.perf_counter() - start)

    async def _respond(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            if answer.is_started:  # all that can still be done is to break the connection off
                log.error("request %s broke off", answer.request_id.decode())
                raise
            await errors.render(error)(scope, receive, answer.send)


class _Answer:
    """Puts the id into the answer's head, and remembers the status."""

    def __init__(self, send: Send, request_id: bytes) -> None:
        self._send, self.request_id = send, request_id
        self.status, self.is_started = errors.CLIENT_CLOSED_REQUEST, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.is_started = message["status"], True
            headers = [*message["headers"], (b"x-request-id", self.request_id)]
            message = {**message, "headers": headers}
        await self._send(message)


def _request_id(scope: Scope) -> bytes:
    """The caller's, if sane; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return bytes(value)
    return uuid.uuid4().hex.encode()


def _route(scope: Scope) -> str:
    """The template, of which there are few, and never the path, which the client chooses."""
    return getattr(scope.get("route"), "path", "unknown")
