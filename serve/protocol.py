"""HTTP itself, as uvicorn reads it: what cannot be read gets our kind of answer, and has an end.

Knows no app; a request that can be read never comes here.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve.api.errors import Answer

MAX_HEAD_BYTES = 64 * 1024


class Protocol(HttpToolsProtocol):
    """uvicorn's own, which has plain text for errors and no limit on a request's head."""

    _is_in_head = True
    _num_head_bytes = 0  # of the reads that were nothing but a part of a head

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if not self._is_in_head:
            self._num_head_bytes = 0
        elif self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"The request's head is longer than {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_head, self._num_head_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = Answer(status, message, code="invalid_http").body()
        head = (
            b"content-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
