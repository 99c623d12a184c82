"""A client that goes away takes its sequences with it, within one step of the engine."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from serve.engine import EngineConfig
from tests.api.conftest import PATIENCE, Server, request, running
from tests.fakes import FakeRunner

pytestmark = pytest.mark.api

Wait = Callable[[], None]


@contextmanager
def connection(server: Server) -> Iterator[socket.socket]:
    address = urlsplit(server.url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port), PATIENCE) as client:
        yield client


def post(client: socket.socket, missing: int = 0, **fields: Any) -> None:
    """Send a request for many tokens, all but the last `missing` bytes of it."""
    body = json.dumps(request(max_tokens=200, **fields)).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body[: len(body) - missing])


@pytest.mark.parametrize("stream", [False, True])
def test_while_running(stream: bool, cancels: Wait) -> None:
    with running(FakeRunner()) as server:
        server.runner.gate.clear()
        with connection(server) as client:
            post(client, stream=stream)
            assert server.runner.at_gate.wait(PATIENCE)
        cancels()  # the client is gone, and the server knows
        server.runner.gate.set()
        finish = server.finishes.next()
        assert finish.reason == "cancelled"
        assert finish.num_generated_tokens == 1  # of the step that was under way
        assert server.runner.calls == [("prefill", 1)]
        assert server.http.get(timeout=PATIENCE)[:2] == ("/v1/completions", 499)


def test_in_the_middle_of_a_stream(cancels: Wait) -> None:
    with running(FakeRunner()) as server:
        server.runner.step_seconds = 0.001  # leaves time to notice before the 200 tokens are over
        with connection(server) as client:
            post(client, stream=True, ignore_eos=True)
            received = b""
            while b"data: " not in received:
                received += client.recv(4096)
            server.runner.gate.clear()
            assert server.runner.at_gate.wait(PATIENCE)
        cancels()
        num_steps = len(server.runner.calls)
        server.runner.gate.set()
        assert server.finishes.next().reason == "cancelled"
        assert len(server.runner.calls) == num_steps + 1
        assert server.http.get(timeout=PATIENCE)[:2] == ("/v1/completions", 200)


@pytest.mark.parametrize("stream", [False, True])
def test_while_queued(stream: bool, cancels: Wait) -> None:
    with running(FakeRunner(), EngineConfig(max_running=1)) as server:
        server.runner.gate.clear()
        first = server.post_later(prompt=[1], max_tokens=3)
        assert server.runner.at_gate.wait(PATIENCE)
        with connection(server) as client:
            post(client, prompt=[2], stream=stream)
        cancels()
        server.runner.gate.set()
        finish = server.finishes.next()
        assert (finish.reason, finish.num_generated_tokens) == ("cancelled", 0)
        assert first.result().status_code == 200
        assert [what for what, _ in server.runner.calls] == ["prefill", "decode", "decode"]


def test_all_choices_go(cancels: Wait) -> None:
    with running(FakeRunner(), EngineConfig(max_running=2)) as server:
        server.runner.gate.clear()
        with connection(server) as client:
            post(client, prompt=[[1], [2], [3]])
            assert server.runner.at_gate.wait(PATIENCE)
        for _ in range(3):
            cancels()
        server.runner.gate.set()
        assert [server.finishes.next().reason for _ in range(3)] == ["cancelled"] * 3


def test_before_the_body_is_complete() -> None:
    with running(FakeRunner()) as server:
        with connection(server) as client:
            post(client, missing=5)
        assert server.http.get(timeout=PATIENCE)[:2] == ("/v1/completions", 499)
        assert server.runner.calls == []


def test_the_server_goes_on(cancels: Wait) -> None:
    with running(FakeRunner()) as server:
        server.runner.gate.clear()
        with connection(server) as client:
            post(client)
            assert server.runner.at_gate.wait(PATIENCE)
        cancels()
        server.runner.gate.set()
        assert server.post(max_tokens=2).status_code == 200
        gauges = server.engine.gauges()
        assert (gauges.num_running, gauges.num_waiting) == (0, 0)
