"""What is no HTTP gets our envelope, too; and neither a head nor a method makes us stumble."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from pathlib import Path

import httpx
import pytest

from serve.api.errors import ErrorResponse
from serve.protocol import MAX_HEAD_BYTES
from tests.api.conftest import PATIENCE, SPEECH, Server, running, speaking

pytestmark = pytest.mark.api

DATA = Path(__file__).parents[1] / "data"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def speak(server: Server, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first answer to this, on a connection of its own."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        with contextlib.suppress(OSError):  # it may have heard enough
            for piece in pieces:
                connection.sendall(piece)
        answer = b""
        while b"\r\n\r\n" not in answer and (more := connection.recv(65536)):
            answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        while len(body) < int(headers["content-length"]):
            body += connection.recv(65536)
    return int(status.split()[1]), headers, body


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00",  # TLS
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"BREW /pot HTTP/1.1\r\n\r\n",
        GET + b"Content-Length: -1\r\n\r\n",
        GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        GET + b"Content-Length: 99999999999999999999999\r\n\r\n",
        GET + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        GET + b"x: a\x00b\r\n\r\n",
    ],
)
def test_what_is_no_http(server: Server, sent: bytes) -> None:
    status, headers, body = speak(server, sent)
    assert status == 400
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    error = ErrorResponse.model_validate_json(body, strict=True).error
    assert error.code == "invalid_http"
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("ends", [False, True])
def test_an_endless_head(server: Server, ends: bool) -> None:
    lines = [b"x-%d: %s\r\n" % (n, b"y" * 1000) for n in range(MAX_HEAD_BYTES // 1000 + 2)]
    status, _, body = speak(server, GET, *(lines if ends else [b"x: ", b"y" * MAX_HEAD_BYTES * 5]))
    assert status == 431
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_large_head_within_the_limit(server: Server) -> None:
    headers = {"x-padding": "y" * (MAX_HEAD_BYTES - 2000)}
    with httpx.Client(timeout=PATIENCE) as client:
        for _ in range(3):  # on one connection: each head counts alone
            assert client.get(f"{server.url}/health", headers=headers).status_code == 200


def test_a_large_body_is_no_head(server: Server) -> None:
    body = b" " * MAX_HEAD_BYTES * 8
    answer = httpx.post(
        f"{server.url}/v1/completions",
        content=body,
        headers={"content-type": "application/json"},
        timeout=PATIENCE,
    )
    assert answer.json()["error"]["code"] == "invalid_json"


def test_an_upgrade_is_not_taken(server: Server) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert speak(server, GET, upgrade)[0] == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics"])
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    head = httpx.head(server.url + path, timeout=PATIENCE)
    get = server.get(path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-length"] == get.headers["content-length"]
    assert head.content == b""


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("HEAD", "/v1/completions", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("OPTIONS", "/health", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("TRACE", "/health", "GET, HEAD"),
    ],
)
def test_wrong_methods_are_told_the_right_ones(
    server: Server, method: str, path: str, allowed: str
) -> None:
    answer = httpx.request(method, server.url + path, timeout=PATIENCE)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/%ff", "/%00", "/v1/models/%ed%a0%80", "/a%0d%0ab", "/%F0%9F"])
def test_paths_that_are_no_text(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path, timeout=PATIENCE)
    assert answer.status_code == 404
    ErrorResponse.model_validate_json(answer.text, strict=True)


def test_https() -> None:
    """By the settings' files, as the command would serve."""
    certificate = str(DATA / "localhost.pem")
    files = {"ssl_certfile": certificate, "ssl_keyfile": str(DATA / "localhost.key")}
    with running(speaking(SPEECH), uvicorn_options=files) as server:
        trusted = ssl.create_default_context(cafile=certificate)
        url = server.url.replace("http://", "https://")
        with httpx.Client(verify=trusted, timeout=PATIENCE) as client:
            assert client.get(f"{url}/health").json() == {"status": "ok"}
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/health", timeout=PATIENCE)
