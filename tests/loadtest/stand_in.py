"""A stand-in for an OpenAI-compatible host: serves scripted replies and remembers what it was sent.

Knows HTTP and nothing of what makes a reply right; the tests write the scripts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Part = str | float | threading.Event  # text to send, seconds to sleep, an event to wait for
WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class Reply:
    """One answer: each text of `parts` leaves in its own chunk, at once."""

    parts: Sequence[Part]
    status: int = 200
    content_type: str = "text/event-stream; charset=utf-8"
    cut: bool = False  # close the connection without the last chunk
    chunked: bool = True  # otherwise the end of the connection is the end of the answer


@dataclass(frozen=True)
class Received:
    """One completion request as it came in."""

    body: dict[str, Any]
    authorization: str | None


class StandIn(ThreadingHTTPServer):
    """Use as a context manager; `url` is where it listens."""

    daemon_threads = False  # so that leaving joins them, and no socket outlives the test

    def __init__(
        self, reply: Callable[[dict[str, Any], int], Reply], models: Reply | None = None
    ) -> None:
        """`reply(body, i)` answers the i-th completion, counted from 0; `models` its GET."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.models = models or model_list("dlight-serve")
        self.received: list[Received] = []
        self.num_model_requests = 0
        self.num_served = 0  # completions whose reply was sent to its end
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = WAIT_SECONDS
    disable_nagle_algorithm = True
    server: StandIn

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.num_model_requests += 1
        self._send(self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            index = len(self.server.received)
            self.server.received.append(Received(body, self.headers["Authorization"]))
        try:
            self._send(self.server.reply(body, index))
        except ConnectionError:
            self.close_connection = True  # the client left early, as it may
            return
        with self.server.lock:
            self.server.num_served += 1

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        if reply.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in reply.parts:
            self._play(part, reply.chunked)
        if reply.chunked and not reply.cut:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = reply.cut or not reply.chunked

    def _play(self, part: Part, chunked: bool) -> None:
        if isinstance(part, float):
            time.sleep(part)
        elif isinstance(part, threading.Event):
            assert part.wait(WAIT_SECONDS), "the client never saw what was sent so far"
        else:
            data = part.encode("utf-8")
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: the tests look at `received`."""


def model_list(owned_by: str | None, *ids: str) -> Reply:
    models = [{"id": i, "object": "model", "owned_by": owned_by} for i in ids or ("gpt2", "other")]
    return json_reply({"object": "list", "data": models})


def json_reply(answer: Any, status: int = 200) -> Reply:
    return Reply([json.dumps(answer)], status, "application/json")


def event(payload: Any) -> str:
    return f"data: {payload if isinstance(payload, str) else json.dumps(payload)}\n\n"


def token(text: str = "a", finish_reason: str | None = None) -> str:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]})


def usage(num_prompt: int, num_generated: int, num_cached: int | None = None) -> str:
    counts: dict[str, Any] = {"prompt_tokens": num_prompt, "completion_tokens": num_generated}
    if num_cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return event({"choices": [], "usage": counts})


def good_parts(
    body: dict[str, Any],
    first_token_seconds: float = 0.0,
    token_seconds: float = 0.0,
    num_cached: int | None = None,
) -> list[Part]:
    """The stream that `body` asks for; sleeps before the first and before each later token."""
    num_tokens = body["max_tokens"]
    parts: list[Part] = [first_token_seconds, token()]
    for i in range(1, num_tokens):
        parts += [token_seconds, token(finish_reason="length" if i == num_tokens - 1 else None)]
    return [*parts, usage(len(body["prompt"]), num_tokens, num_cached), event("[DONE]")]
