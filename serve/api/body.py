"""Read a request's JSON into a schema, and no more of it than is allowed. Knows no endpoint."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api import errors, limits
from serve.api.errors import invalid_body
from serve.api.schemas import RequestModel
from serve.errors import BodyTooLargeError, RequestError

Schema = TypeVar("Schema", bound=RequestModel)

LINGER_SECONDS = 2.0


async def read_json(request: Request, schema: type[Schema]) -> Schema:
    """The body as `schema`. Raises RequestError, naming the field; ClientDisconnect.

    The content type must say JSON: it is what keeps a web page of another origin from posting here.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"Content-Type is {kind!r}; send application/json", "body", "invalid_content_type"
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise RequestError(
            f"Content-Encoding is {encoding!r}; send the JSON as it is",
            "body",
            "invalid_content_type",
        )
    refuses = limits.of(request).unknown_fields == "refuse"
    try:
        return schema.model_validate_json(await request.body(), extra=None if refuses else "ignore")
    except ValidationError as error:
        raise invalid_body(error) from None


class BodyLimit:
    """Answers a body of more than `max_bytes` with BodyTooLargeError as soon as it is known.

    One that says its length is not looked at: HTTP holds a client to that.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, on_rejected: Callable[[str], None]) -> None:
        self._app, self._max_bytes, self._on_rejected = app, max_bytes, on_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (length := _length(scope)) <= self._max_bytes:
            await self._app(scope, receive, send)
            return
        body = _CountedBody(receive, send, self._max_bytes)
        if length == math.inf:  # chunked: it does not say
            await self._app(scope, body.receive, body.send)
        else:
            body.is_over = True
            await errors.render(BodyTooLargeError(self._max_bytes))(scope, receive, body.send)
        if body.is_over:
            self._on_rejected(BodyTooLargeError.reason)


class _CountedBody:
    """A request's body as it comes in, and its answer.

    To close a connection with bytes unread would reset it, and the client might never see the
    answer that says why. So what still comes is read, for a while, and thrown away.
    """

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive, self._send, self._max_bytes = receive, send, max_bytes
        self._num_bytes = 0
        self.is_over = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            self.is_over = True
            raise BodyTooLargeError(self._max_bytes)
        return message

    async def send(self, message: Message) -> None:
        if not self.is_over or message["type"] != "http.response.body":
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await self._receive()).get("more_body"):
                    pass
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _length(scope: Scope) -> float:
    """Of the body in bytes, as the request's head says; infinite if it does not say."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return math.inf
    try:
        return int(headers.get(b"content-length", b"0"))
    except ValueError:
        return math.inf
