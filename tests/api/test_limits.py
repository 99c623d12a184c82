"""How much, how often, how long; and that a refusal says when to come back, and is heard."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api import auth
from serve.api import body as body_module
from serve.api.auth import Keys
from serve.api.limits import Limits, RateLimiter
from serve.errors import OverloadedError, RequestError
from tests.api.conftest import PATIENCE, SPEECH, Server, request, running, speaking

pytestmark = pytest.mark.api

MAX = 4096
JSON = {"content-type": "application/json"}


# -- bodies


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    with running(speaking(SPEECH), limits=Limits(max_body_bytes=MAX)) as server:
        yield server


def body(num_bytes: int) -> bytes:
    """A valid request of so many bytes."""
    text = json.dumps(request()).encode()
    return text + b" " * (num_bytes - len(text))


def chunks(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), 1000):
        yield content[start : start + 1000]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_up_to_the_limit(small: Server, chunked: bool) -> None:
    for num_bytes, status in ((MAX, 200), (MAX + 1, 413), (100 * MAX, 413)):
        content = chunks(body(num_bytes)) if chunked else body(num_bytes)
        answer = httpx.post(
            f"{small.url}/v1/completions", content=content, headers=JSON, timeout=PATIENCE
        )
        assert answer.status_code == status
        if status == 413:
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == ("body", "body_too_large")
            assert str(MAX) in error["message"]
            assert answer.headers["connection"] == "close"
            assert "x-request-id" in answer.headers


def speak(server: Server, head: str, *pieces: bytes) -> bytes:
    """All that the server answers to this, until it closes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while more := connection.recv(65536):
            answer += more
    return answer


TYPE = "Content-Type: application/json\r\n"


def test_a_declared_body_is_refused_before_it_comes(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "LINGER_SECONDS", 0.01)
    answer = speak(small, f"{TYPE}Content-Length: {10**15}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code": "body_too_large"' in answer
    answer = speak(small, f"{TYPE}Content-Length: {MAX + 1}\r\nExpect: 100-continue")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_is_refused_before_its_end(
    small: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_module, "LINGER_SECONDS", 0.01)
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    answer = speak(small, f"{TYPE}Transfer-Encoding: chunked", chunk, b"1\r\n \r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_the_answer_arrives_while_the_client_still_sends(small: Server) -> None:
    num_bytes = 30_000_000  # more than the kernel keeps for anybody
    answer = speak(small, f"{TYPE}Content-Length: {num_bytes}", b" " * num_bytes)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.endswith(b"}")
    assert small.post().status_code == 200


def test_a_get_may_have_no_more_body_than_a_post(small: Server) -> None:
    answer = httpx.request("GET", f"{small.url}/health", content=b"x" * (MAX + 1), timeout=PATIENCE)
    assert answer.status_code == 413


def test_too_large_bodies_are_counted() -> None:
    reasons: list[str] = []
    limits = Limits(max_body_bytes=10)
    with running(speaking(SPEECH), limits=limits, on_rejected=reasons.append) as server:
        assert server.post().status_code == 413
        url = f"{server.url}/v1/completions"
        chunked = httpx.post(url, content=chunks(body(100)), headers=JSON, timeout=PATIENCE)
        assert chunked.status_code == 413
    assert reasons == ["body_too_large"] * 2


# -- the rate


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def may(limiter: RateLimiter, client: str = "a") -> bool:
    try:
        limiter.enter(client)
    except OverloadedError:
        return False
    return True


def test_a_burst_and_then_the_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(60, 3, clock)
    assert [may(limiter) for _ in range(4)] == [True, True, True, False]
    assert may(limiter, "b")
    clock.now += 1
    assert [may(limiter) for _ in range(2)] == [True, False]
    clock.now += 1000
    assert [may(limiter) for _ in range(4)] == [True, True, True, False]


@given(
    st.integers(1, 6000),
    st.integers(1, 20),
    st.lists(st.floats(0, 120), max_size=60),
)
def test_against_a_bucket_and_the_wait_is_honest(
    per_minute: int, burst: int, pauses: list[float]
) -> None:
    clock = Clock()
    limiter = RateLimiter(per_minute, burst, clock)
    bucket = float(burst)
    for pause in pauses:
        clock.now += pause
        bucket = min(burst, bucket + pause * per_minute / 60)
        if abs(bucket - 1) < 1e-6:
            return  # which side it is on, rounding decides
        try:
            limiter.enter("a")
        except OverloadedError as error:
            assert bucket < 1
            wait = error.retry_after_seconds
            assert wait == pytest.approx((1 - bucket) * 60 / per_minute, abs=1e-6)
        else:
            assert bucket > 1
            bucket -= 1


def test_no_more_clients_are_remembered_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RateLimiter, "_MOST_CLIENTS", 2)
    limiter = RateLimiter(1, 1, Clock())
    assert may(limiter, "a")
    assert may(limiter, "b")
    assert not may(limiter, "a")  # remembered, and now the last one seen
    assert may(limiter, "c")
    assert may(limiter, "b")  # forgotten


def test_too_many_requests() -> None:
    reasons: list[str] = []
    keys = Keys(["key-one-1", "key-two-2"])
    limits = Limits(requests_per_minute=1, burst=2)
    with running(
        speaking(SPEECH), limits=limits, api_keys=keys, on_rejected=reasons.append
    ) as server:

        def ask(key: str) -> httpx.Response:
            return server.get("/v1/models", headers={"authorization": f"Bearer {key}"})

        assert [ask("key-one-1").status_code for _ in range(2)] == [200, 200]
        refused = ask("key-one-1")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 50 <= int(refused.headers["retry-after"]) <= 60
        assert ask("key-two-2").status_code == 200
        assert ask("a-wrong-key").status_code == 401
        assert server.get("/health").status_code == 200
        seen = [server.http.get(timeout=PATIENCE)[:2] for _ in range(6)]
    assert reasons == ["rate_limit", "invalid_key"]
    assert seen[2:5] == [("/v1/models", 429), ("/v1/models", 200), ("/v1/models", 401)]


def test_without_keys_each_address_has_its_rate() -> None:
    with running(speaking(SPEECH), limits=Limits(requests_per_minute=1, burst=1)) as server:
        assert server.post().status_code == 200
        assert server.post().status_code == 429
        forwarded = {"x-forwarded-for": "10.1.2.3"}  # anybody can say that
        assert server.get("/v1/models", headers=forwarded).status_code == 429
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=transport, timeout=PATIENCE) as other:
            assert other.get(f"{server.url}/v1/models").status_code == 200


def test_a_client_of_ipv6_is_a_network() -> None:
    def address(host: str) -> str:
        return auth._address({"client": (host, 5)})

    assert address("2001:db8::1") == address("2001:db8::ffff:1") != address("2001:db8:1::1")
    assert address("::ffff:10.0.0.1") == address("10.0.0.1") != address("::ffff:10.0.0.2")
    assert address("fe80::1%eth0") == "fe80::/64"
    assert auth._address({"client": None}) == ""


# -- time


@pytest.mark.parametrize(
    ("default", "longest", "asked", "expected"),
    [
        (None, None, None, None),
        (None, None, 5.0, 5.0),
        (3.0, None, None, 3.0),
        (3.0, None, 5.0, 5.0),
        (None, 9.0, None, 9.0),
        (3.0, 9.0, None, 3.0),
        (3.0, 9.0, 9.0, 9.0),
    ],
)
def test_timeouts(
    default: float | None, longest: float | None, asked: float | None, expected: float | None
) -> None:
    limits = Limits(default_timeout_seconds=default, max_timeout_seconds=longest)
    assert limits.timeout(asked) == expected


def test_a_timeout_over_the_limit() -> None:
    with pytest.raises(RequestError, match="at most 9 seconds") as found:
        Limits(max_timeout_seconds=9.0).timeout(9.5)
    assert found.value.param == "timeout"


# -- fields


def test_unknown_fields_may_be_ignored() -> None:
    with running(speaking(SPEECH), limits=Limits(unknown_fields="ignore")) as server:
        assert server.post(nonsense=1).status_code == 200
        assert server.stream(nonsense=1, stream_options={"include_usage": True, "nonsense": 1})
        assert server.post(max_tokens=-1).status_code == 400
    with running(speaking(SPEECH)) as server:
        assert server.post(nonsense=1).status_code == 400
