"""HTTP itself, where uvicorn falls short: errors in our envelope, limits, upgrades, HTTP/1.0.

Knows no app.
"""

from __future__ import annotations

from itertools import chain
from typing import NoReturn

import httptools
from uvicorn import _types as asgi
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serve.api.errors import Answer

MAX_HEAD_BYTES = 64 * 1024
_App = asgi.ASGI3Application
_TOO_LONG = f"The request's head is longer than {MAX_HEAD_BYTES} bytes"
_FRAMING = (b"content-length", b"transfer-encoding", b"connection")  # say where a message ends


class Protocol(HttpToolsProtocol):
    """uvicorn's own, with other answers to what it refuses, has no limit for, or misreads."""

    _num_idle_bytes = 0  # of the reads since the last that ended a head or had some of a body
    _is_head_known = False  # what the parser reads is a head that has been dealt with

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._num_idle_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            msg = "Invalid HTTP request received."
            self.logger.warning(msg)
            self.send_400_response(msg)
        else:
            if self._num_idle_bytes > MAX_HEAD_BYTES:
                self._refuse(431, _TOO_LONG)

    def _feed(self, data: bytes | memoryview) -> None:
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = memoryview(data)[upgrade.args[0] :]
                self._ignore_upgrade()
            else:
                return

    def _ignore_upgrade(self) -> None:
        """Have what follows parsed as if the request, whose head is read, had not asked for one.

        llhttp would take the body for another protocol's, so a new parser gets the head again.
        """
        lines = [b"%s: %s\r\n" % field for field in self.headers if field[0] in _FRAMING]
        version = self.scope["http_version"].encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._is_head_known = True
        self.parser.feed_data(b"POST / HTTP/%s\r\n%s\r\n" % (version, b"".join(lines)))
        self._is_head_known = False

    def on_headers_complete(self) -> None:
        self._num_idle_bytes = 0
        if self._is_head_known:
            return
        # A name and its value come with four more bytes, and the URL with about as many.
        num_bytes = len(self.url) + sum(map(len, chain(*self.headers))) + 4 * len(self.headers) + 4
        if num_bytes > MAX_HEAD_BYTES:
            self._stop(431, _TOO_LONG)
        num_hosts = [name for name, _ in self.headers].count(b"host")
        if num_hosts != 1 and self.parser.get_http_version() == "1.1":
            self._stop(400, f"A request has one Host header, this one has {num_hosts}")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # its body is still to come: see _ignore_upgrade
        self._num_idle_bytes = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: _App) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _stop(self, status: int, message: str) -> NoReturn:
        """Refuse, from within a call of the parser, which shall parse no further."""
        self._refuse(status, message)
        raise ValueError(message)

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = Answer(status, message, code="invalid_http").body()
        head = (
            b"content-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def _without_chunks(app: _App, cycle: RequestResponseCycle) -> _App:
    """An answer without content-length ends with the connection: HTTP/1.0 knows no chunks.

    For the cycle its length is known, and each piece adds what it needs.
    """
    is_length_known = True

    async def send(message: asgi.ASGISendEvent) -> None:
        nonlocal is_length_known
        if message["type"] == "http.response.start":
            names = [name.lower() for name, _ in message.get("headers", [])]
            is_length_known = b"content-length" in names
            cycle.chunked_encoding = None if is_length_known else False
        elif message["type"] == "http.response.body" and not is_length_known:
            cycle.expected_content_length = len(message.get("body", b""))
        await cycle.send(message)

    async def run(scope: asgi.Scope, receive: asgi.ASGIReceiveCallable, _: object) -> None:
        await app(scope, receive, send)

    return run
