"""The HTTP side against a real server in this process: timing, broken answers, the model to use."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from loadtest.errors import HostError
from loadtest.host import Host
from loadtest.stream import CompletionStream
from loadtest.target import Target, find_target
from loadtest.workload import Workload
from tests.loadtest.stand_in import (
    Part,
    Reply,
    StandIn,
    event,
    good_parts,
    json_reply,
    model_list,
    token,
    usage,
)

pytestmark = pytest.mark.loadtest

WORKLOAD = Workload(num_decode_tokens=3)
BODY = json.dumps(WORKLOAD.body("gpt2")).encode()


def good(body: dict[str, Any], _index: int) -> Reply:
    return Reply(good_parts(body))


def failure_of(reply: Reply) -> str:
    """What a completion that the host answers so fails with."""
    with StandIn(lambda _body, _index: reply) as server, closing(Host(server.url)) as host:
        stream = CompletionStream(WORKLOAD)
        with pytest.raises(HostError) as caught, host.stream(BODY) as lines:
            stream.read(lines)
        return str(caught.value)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "until close"])
def test_a_line_is_there_as_soon_as_it_was_sent(chunked: bool) -> None:
    """The host holds back the rest until its first event was read: a client that waits for a
    full buffer would never see either."""
    seen = threading.Event()
    rest: list[Part] = [seen, token("b"), token("c", "length"), usage(322, 3), event("[DONE]")]
    reply = Reply([token("a"), *rest], chunked=chunked)
    with StandIn(lambda _body, _index: reply) as server, closing(Host(server.url)) as host:
        stream = CompletionStream(WORKLOAD)
        with host.stream(BODY) as lines:
            measured = stream.read(_telling(lines, seen))
    assert measured.started_at < measured.first_token_at < measured.last_token_at
    assert measured.last_token_at <= measured.done_at


def _telling(lines: Iterator[bytes], seen: threading.Event) -> Iterator[bytes]:
    for line in lines:
        seen.set()
        yield line


def test_one_connection_serves_all_of_a_users_requests() -> None:
    ports = set()

    class Counting(StandIn):
        def process_request(self, request: Any, client_address: Any) -> None:
            ports.add(client_address)
            super().process_request(request, client_address)

    with Counting(good) as server, closing(Host(server.url)) as host:
        host.models()
        for _ in range(3):
            stream = CompletionStream(WORKLOAD)
            with host.stream(BODY) as lines:
                stream.read(lines)
        assert server.num_served == 3
    assert len(ports) == 1


def test_leaving_early_closes_the_connection() -> None:
    """The host goes on only once the client has left, and then cannot send all it has."""
    left = threading.Event()
    endless = Reply([token("a"), left, *[token("b" * 4096)] * 10_000])
    with StandIn(lambda _body, _index: endless) as server, closing(Host(server.url)) as host:
        with host.stream(BODY) as lines:
            next(lines)
        left.set()
    assert server.num_served == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            json_reply({"error": {"message": "The queue is full"}}, 429),
            "HTTP 429: The queue is full",
        ),
        (Reply(["boom"], 500, "text/plain"), "HTTP 500: boom"),
        (Reply([], 307), "HTTP 307: (no body)"),
        (json_reply({"choices": []}), "asked for a stream of events, got application/json"),
        (Reply([token("a")], cut=True), "connection ended within the answer"),
        (Reply([token("a")]), "the stream ended without [DONE]"),
        (Reply([token("a")], chunked=False), "the stream ended without [DONE]"),
        (Reply([event({"error": {"message": "gone"}})]), "error within the stream: gone"),
    ],
)
def test_a_wrong_answer_fails_clearly(reply: Reply, message: str) -> None:
    assert message in failure_of(reply)


def test_a_host_that_is_down_fails_clearly() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    down = closing(Host(f"http://127.0.0.1:{port}"))
    with down as host, pytest.raises(HostError, match=r"connection failed: .*refused"):
        host.models()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://127.0.0.1", "http://"])
def test_a_host_that_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected http://host:port"):
        Host(url)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_a_base_url_as_the_openai_client_takes_it_works(path: str) -> None:
    with StandIn(good) as server, closing(Host(server.url + path)) as host:
        assert [m["id"] for m in host.models()] == ["gpt2", "other"]


def target_of(models: Reply, model: str | None = None) -> Target:
    with StandIn(good, models) as server, closing(Host(server.url)) as host:
        return find_target(host, model)


def test_the_model_is_the_hosts_first_unless_named() -> None:
    assert target_of(model_list("vllm", "a", "b")) == Target("a", "vllm")
    assert target_of(model_list("vllm", "a", "b"), "b") == Target("b", "vllm")
    assert target_of(model_list("vllm", "a", "b"), "a-lora") == Target("a-lora", "vllm")


@pytest.mark.parametrize(
    ("owner", "takes_salt"),
    [("dlight-serve", True), ("vllm", True), ("llamacpp", False), ("", False), (None, False)],
)
def test_only_known_owners_get_a_salt(owner: str | None, takes_salt: bool) -> None:
    assert target_of(model_list(owner)).takes_cache_salt is takes_salt


def test_a_named_model_needs_no_list_of_models() -> None:
    missing = json_reply({"error": {"message": "no such route"}}, 404)
    assert target_of(missing, "gpt2") == Target("gpt2", None)
    with pytest.raises(HostError, match="HTTP 404: no such route"):
        target_of(missing)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (json_reply({"data": []}), "lists no model; name one with --model"),
        (json_reply({"models": []}), "is no list of models"),
        (json_reply([1]), "is no list of models"),
        (json_reply({"data": [7]}), "is no list of models"),
        (json_reply({"data": [{"object": "model"}]}), "is no list of models"),
        (Reply(["<html>"], 200, "text/html"), "is no list of models"),
        (json_reply({"error": {"message": "wrong key"}}, 401), "HTTP 401: wrong key"),
    ],
)
def test_a_list_of_models_that_is_wrong_fails_clearly(models: Reply, message: str) -> None:
    with pytest.raises(HostError) as caught:
        target_of(models)
    assert message in str(caught.value)


def test_a_list_that_fails_for_another_reason_is_not_taken_for_a_missing_one() -> None:
    with pytest.raises(HostError, match="HTTP 401"):
        target_of(json_reply({"error": {"message": "wrong key"}}, 401), "gpt2")
