"""HTTP to one OpenAI-compatible host, over a connection that is kept alive.

Turns whatever goes wrong into a HostError; knows nothing of streams' contents or of Locust.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPParseError, HTTPSocketPoolResponse

from loadtest.errors import HostError, error_message

CONNECT_TIMEOUT_SECONDS = 10.0
SILENCE_TIMEOUT_SECONDS = 300.0  # without one byte: a queued request may wait for long


class Host:
    """One host as one user sees it: one connection, one request at a time."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`url` as `http://host:port`, with or without `/v1`; raises ValueError for others."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"host = {url!r}: expected http://host:port or https://host")
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._client = HTTPClient.from_url(
            url,
            connection_timeout=CONNECT_TIMEOUT_SECONDS,
            network_timeout=SILENCE_TIMEOUT_SECONDS,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
        )

    def models(self) -> list[dict[str, Any]]:
        """The entries of `GET /v1/models`; raises HostError for anything else."""
        with _plain_errors(), self._client.get(f"{self._prefix}/v1/models") as response:
            _expect_ok(response)
            answer = bytes(response.read())
        try:
            models = json.loads(answer)["data"]
            return [{**model, "id": str(model["id"])} for model in models]
        except (ValueError, KeyError, TypeError):
            raise HostError(f"/v1/models is no list of models: {answer[:200]!r}") from None

    @contextmanager
    def stream(self, body: bytes) -> Iterator[Iterator[bytes]]:
        """POST a completion; yields its lines, each as soon as it has arrived.

        Raises HostError for another status than 200, another type than SSE, a broken connection
        and silence. Leaving early closes the connection, which ends the request on the host.
        """
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        path = f"{self._prefix}/v1/completions"
        with _plain_errors(), self._client.post(path, body, headers) as response:
            _expect_ok(response)
            _expect_event_stream(response)
            # Not read(n), nor Locust's iter_lines: both wait until n bytes are there.
            yield iter(lambda: response.readline(b"\n"), b"")

    def close(self) -> None:
        self._client.close()


def _expect_ok(response: HTTPSocketPoolResponse) -> None:
    status = response.status_code
    if status != 200:
        raise HostError(f"HTTP {status}: {error_message(response.read())}", status)


def _expect_event_stream(response: HTTPSocketPoolResponse) -> None:
    kind = str(response.get("content-type", "no content-type"))
    if not kind.startswith("text/event-stream"):
        raise HostError(f"asked for a stream of events, got {kind}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise HostError(f"no byte in time: {error}") from error
    except OSError as error:
        raise HostError(f"connection failed: {error}") from error
    except HTTPParseError as error:
        raise HostError(f"connection ended within the answer: {error}") from error
