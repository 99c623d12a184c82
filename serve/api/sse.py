"""Server-sent events: how a stream of JSON goes over HTTP. Knows nothing of what the events say."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api import errors

DONE = b"data: [DONE]\n\n"


def event(data: str) -> bytes:
    """One event; `data` is one line, as JSON always is."""
    return f"data: {data}\n\n".encode()


def error_event(error: Exception) -> bytes:
    """Ends a stream that failed. OpenAI's clients know it by its data, EventSource by its name."""
    return b"event: error\n" + event(errors.answer(error).body().decode())


class EventStream(Response):
    """Sends framed events as they come. Their exception becomes an `error` event, the last one.

    Not Starlette's StreamingResponse, which reads the client's disconnect itself: here the
    generation has to see it, also before the answer begins.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._first, self._events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        async with aclosing(self._events):
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await self._send_events(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, send: Send) -> None:
        await _send(send, self._first)
        try:
            async for events in self._events:
                await _send(send, events)
        except ClientDisconnect:
            return  # nobody is left to tell; closing the events cancels the sequences
        except Exception as error:
            await _send(send, error_event(error))


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
