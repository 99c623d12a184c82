"""What is no HTTP gets our envelope, too; neither head, method, version nor upgrade trips us."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from serve.api.errors import ErrorResponse
from serve.protocol import MAX_HEAD_BYTES, Protocol
from tests.api.conftest import PATIENCE, SPEECH, Server, encode, request, running, speaking
from tests.fakes import FakeRunner

pytestmark = pytest.mark.api

DATA = Path(__file__).parents[1] / "data"
Spoken = tuple[int, dict[str, str], bytes]  # status, headers, body

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


class Connection:
    """One to the server, which says byte for byte what a test wants it to."""

    def __init__(self, server: Server) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), PATIENCE)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, *pieces: bytes) -> None:
        with contextlib.suppress(OSError):  # it may have heard enough
            for piece in pieces:
                self._socket.sendall(piece)

    def read_head(self) -> tuple[int, dict[str, str]]:
        status, *lines = iter(lambda: self._file.readline().strip().decode(), "")
        return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines)

    def read(self, num_bytes: int = -1) -> bytes:
        """So many, or all until it is closed."""
        return self._file.read(num_bytes)

    def read_answer(self) -> Spoken:
        status, headers = self.read_head()
        return status, headers, self.read(int(headers["content-length"]))

    def read_line(self) -> bytes:
        return self._file.readline()


def speak(server: Server, *pieces: bytes) -> Spoken:
    """Status, headers and body of the first answer to this, on a connection of its own."""
    with Connection(server) as connection:
        connection.send(*pieces)
        return connection.read_answer()


def post(head: bytes = b"", chunked: bool = False, version: str = "1.1", **fields: Any) -> bytes:
    """A request for a completion, as it is sent."""
    body = json.dumps(request(max_tokens=3, **fields)).encode()
    if chunked:
        body = b"5\r\n%s\r\n%x;x=y\r\n%s\r\n0\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
        length = b"Transfer-Encoding: chunked\r\n"
    else:
        length = b"Content-Length: %d\r\n" % len(body)
    line = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\n".encode()
    return line + head + length + b"Content-Type: application/json\r\n\r\n" + body


@pytest.fixture(params=[1, 7, 1 << 20])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the server read no more than so many bytes at once."""
    whole, size = Protocol.data_received, request.param

    def in_pieces(self: Protocol, data: bytes) -> None:
        for start in range(0, len(data), size):
            if not self.transport.is_closing():
                whole(self, data[start : start + size])

    monkeypatch.setattr(Protocol, "data_received", in_pieces)


# -- what cannot be read


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00",  # TLS
        GET + b"no colon\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"BREW /pot HTTP/1.1\r\nHost: x\r\n\r\n",
        GET + b"Content-Length: -1\r\n\r\n",
        GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        GET + b"Content-Length: 99999999999999999999999\r\n\r\n",
        GET + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
        GET + b"x: a\x00b\r\n\r\n",
        GET + b"Host: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
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


# -- how long a head may be


SLACK = 16  # bytes, of which we do not know


@pytest.mark.parametrize("part", ["url", "header", "headers"])
@pytest.mark.parametrize(("num_bytes", "status"), [(0, 200), (SLACK, 431), (5000, 431)])
@pytest.mark.parametrize("num_reads", [1, 2, 70])
def test_a_head_by_the_limit(
    server: Server, part: str, num_bytes: int, status: int, num_reads: int
) -> None:
    before, after = {
        "url": (b"GET /health?", b" HTTP/1.1\r\nHost: x\r\n\r\n"),
        "header": (GET + b"x: ", b"\r\n\r\n"),
        "headers": (GET + b"x: y\r\n" * 9000 + b"x: ", b"\r\n\r\n"),
    }[part]
    head = before.ljust(MAX_HEAD_BYTES + num_bytes - len(after), b"x") + after
    size = len(head) // num_reads + 1
    answer = speak(server, *(head[i : i + size] for i in range(0, len(head), size)))
    assert answer[0] == status
    if status == 431:
        assert json.loads(answer[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize(
    "start",
    [
        b"GET /",
        GET + b"x: ",
        b"\r\n",
        post(chunked=True).removesuffix(b"\r\n") + b"x: ",
        post(chunked=True)[:-5] + b"5;x=",
    ],
)
def test_an_endless_head(server: Server, start: bytes) -> None:
    """Or one of a chunk, or the end of a chunked body, which is a head, too."""
    more = start if start == b"\r\n" else b"y"
    assert speak(server, start, more * MAX_HEAD_BYTES * 5)[0] == 431


def test_what_comes_before_a_head_does_not_count(server: Server) -> None:
    """Not even in the same read."""
    body = b" " * (MAX_HEAD_BYTES + 1000)
    post = b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with Connection(server) as connection:
        connection.send(post + body + GET + b"x: ", b"y" * 60000 + b"\r\n\r\n")
        assert [connection.read_answer()[0] for _ in range(2)] == [405, 200]


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


# -- upgrades


UPGRADES = [
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"connection: keep-alive\r\nconnection: upgrade\r\nupgrade: websocket\r\n",
]
UPGRADE = UPGRADES[0]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("chunked", [False, True])
def test_an_upgrade_is_ignored(
    upgrade: bytes, chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The body is read, and what follows it is the next request, whatever this asks for."""
    with running(speaking(SPEECH)) as server, Connection(server) as connection:
        asked = post(upgrade, chunked)
        connection.send(asked + asked + GET + upgrade + b"\r\n" + GET + b"\r\n" + asked)
        answers = [connection.read_answer() for _ in range(5)]
        connection.send(asked)
        answers.append(connection.read_answer())
    assert [answer[0] for answer in answers] == [200] * 6
    bodies = [json.loads(answer[2]) for answer in answers]
    assert bodies[2] == bodies[3] == {"status": "ok"}
    said = [body["choices"][0]["text"] for body in (*bodies[:2], *bodies[4:])]
    assert said == [" score and seven"] * 4
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_upgrade_and_then_the_end(server: Server, version: str) -> None:
    close = UPGRADE.replace(b"Upgrade,", b"close, Upgrade,")
    asked = post(close if version == "1.1" else UPGRADE, version=version)
    with Connection(server) as connection:
        connection.send(asked + asked)
        status, headers, _ = connection.read_answer()
        assert (status, headers["connection"]) == (200, "close")
        assert connection.read() == b""


def test_an_upgrade_that_waits_for_our_word(server: Server) -> None:
    head, _, body = post(UPGRADE + b"Expect: 100-continue\r\n").partition(b"\r\n\r\n")
    with Connection(server) as connection:
        for _ in range(2):
            connection.send(head + b"\r\n\r\n")
            assert connection.read_head() == (100, {})
            connection.send(body)
            assert connection.read_answer()[0] == 200


def test_an_error_behind_an_upgrade(server: Server) -> None:
    with Connection(server) as connection:
        connection.send(post(UPGRADE))
        assert connection.read_answer()[0] == 200
        connection.send(b"nonsense\r\n\r\n")
        status, headers, _ = connection.read_answer()
        assert (status, headers["connection"]) == (400, "close")
        assert connection.read() == b""
    assert speak(server, post(UPGRADE, chunked=True).replace(b";x=y", b"nonsense"))[0] == 400


def test_the_limits_hold_behind_an_upgrade(server: Server) -> None:
    endless = b"GET /" + b"y" * MAX_HEAD_BYTES
    with Connection(server) as connection:
        connection.send(post(UPGRADE))
        assert connection.read_answer()[0] == 200
        connection.send(endless)
        assert connection.read_answer()[0] == 431
    assert speak(server, GET + UPGRADE + b"x: " + endless + b"\r\n\r\n")[0] == 431
    assert speak(server, GET + b"Host: y\r\n" + UPGRADE + b"\r\n")[0] == 400


def test_no_tunnel(server: Server) -> None:
    connect = b"CONNECT /health HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nxx"
    with Connection(server) as connection:
        connection.send(connect + GET + b"\r\n")
        assert [connection.read_answer()[0] for _ in range(2)] == [405, 200]


# -- HTTP/1.0


def test_a_stream_over_http_1_0() -> None:
    """Has no chunks: it comes piece by piece, and ends with the connection."""
    pace: queue.SimpleQueue[None] = queue.SimpleQueue()
    ids = encode(SPEECH)

    def paced(before: Sequence[int]) -> int:
        pace.get(timeout=PATIENCE)
        return ids[len(before)]

    with running(FakeRunner(next_token=paced)) as server, Connection(server) as connection:
        connection.send(post(version="1.0", stream=True))
        pace.put(None)
        status, headers = connection.read_head()
        assert (status, headers["connection"]) == (200, "close")
        assert not {"transfer-encoding", "content-length"} & headers.keys()
        assert json.loads(connection.read_line().removeprefix(b"data: "))["choices"]
        pace.put(None)
        pace.put(None)
        *_, last, done = filter(None, connection.read().split(b"\n"))
        assert json.loads(last.removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"
        assert done == b"data: [DONE]"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
        (b"GET /nowhere HTTP/1.0\r\n\r\n", 404),
        (post(version="1.0"), 200),
    ],
)
def test_an_answer_over_http_1_0(server: Server, sent: bytes, status: int) -> None:
    """Has a length, like over 1.1, and is the last."""
    with Connection(server) as connection:
        connection.send(sent)
        found, headers, body = connection.read_answer()
        assert (found, headers["connection"]) == (status, "close")
        assert json.loads(body)
        assert connection.read() == b""


def test_head_over_http_1_0(server: Server) -> None:
    with Connection(server) as connection:
        connection.send(b"HEAD /health HTTP/1.0\r\n\r\n")
        assert connection.read_head()[0] == 200
        assert connection.read() == b""


# -- methods, paths, TLS


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
