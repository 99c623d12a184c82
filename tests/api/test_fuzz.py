"""Thousands of requests that nobody would send: never a 5xx, always our envelope, then business."""

from __future__ import annotations

import asyncio
import http.client
import json
import string
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.api.errors import MAX_BODY_BYTES, ErrorResponse
from serve.api.limits import Limits
from tests.api.conftest import PATIENCE, SPEECH, Server, encode, running
from tests.fakes import LIMITS, FakeAdmin, FakeRunner, scripted

with warnings.catch_warnings():  # of what it imports itself
    warnings.simplefilter("ignore")
    import requests
    import schemathesis

pytestmark = pytest.mark.api

# How many requests each part sends at least: 5,000 together.
MIN_DESCRIBED, MIN_OVER_HTTP, MIN_IN_PROCESS = 1000, 1000, 3000
NO_LIMITS = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Server]:
    """Short contexts: what does ask for text sensibly is soon answered."""
    limits = replace(LIMITS, max_context=48)
    line = encode(SPEECH)
    runner = FakeRunner(limits, scripted(50256, line))
    with running(runner, limits=Limits(max_body_bytes=20_000), admin=FakeAdmin()) as server:
        yield server


Request = tuple[str, str, list[tuple[str, str]], bytes]  # method, target, headers, body


@dataclass(frozen=True)
class Seen:
    status: int
    headers: Mapping[str, str]
    body: bytes


def check(seen: Seen, sent: object, may_time_out: bool = False) -> None:
    """`sent` is shown if it fails."""
    status, headers = seen.status, seen.headers
    assert status < 500 or (status == 504 and may_time_out), (status, seen.body, sent)
    assert headers["x-request-id"], sent
    if status >= 400:
        assert headers["content-type"] == "application/json", sent
        assert len(seen.body) <= MAX_BODY_BYTES, sent
        ErrorResponse.model_validate_json(seen.body, strict=True)
    told = {401: "www-authenticate", 405: "allow", 429: "retry-after"}
    assert status not in told or headers[told[status]], sent


def is_fine(server: Server) -> None:
    """It serves as ever, and nothing is left of what was."""
    assert server.post(prompt="Four score and", max_tokens=2).json()["choices"][0]["text"]
    assert server.get("/health").status_code == 200
    assert server.engine.gauges().num_running == 0


# -- what the description of the API allows, and what it does not


def test_by_the_description(fuzzed: Server) -> None:
    schema = schemathesis.openapi.from_dict(fuzzed.app.openapi())
    schema.config.update(base_url=fuzzed.url)
    num_sent = 0
    operations: list[Any] = list(schema.get_all_operations())
    modes = schemathesis.GenerationMode
    with requests.Session() as session:
        for operation in (found.ok() for found in operations):
            for mode in (modes.POSITIVE, modes.NEGATIVE)[: 2 if operation.body else 1]:

                @settings(NO_LIMITS, max_examples=150)
                @given(operation.as_strategy(generation_mode=mode))
                def send(case: Any) -> None:
                    nonlocal num_sent
                    body = case.body if isinstance(case.body, dict) else {}
                    if isinstance(body.get("model"), str):
                        body["model"] = "gettysburg"  # else it would all end there
                    answer = case.call(session=session, timeout=PATIENCE)
                    num_sent += 1
                    headers = {name: values[0] for name, values in answer.headers.items()}
                    seen = Seen(answer.status_code, headers, answer.content)
                    check(seen, case, may_time_out="timeout" in body)

                send()
    is_fine(fuzzed)
    assert num_sent >= MIN_DESCRIBED


# -- what no description speaks of

# Where a POST is welcome, and with what.
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Four score", "max_tokens": 2, "temperature": 0},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Four"}], "max_tokens": 2},
    "/tokenize": {"prompt": "Four score"},
    "/detokenize": {"tokens": [15137, 4776]},
    "/admin/models/load": {"profile": "full", "wait": True},
    "/admin/models/unload": {"profile": "baseline"},
}
OTHER_PATHS = [
    "/v1/models", "/v1/models/gettysburg", "/v1/profiles", "/v1/profiles/full", "/admin/models",
    "/health", "/ready", "/version", "/metrics", "/openapi.json", "/", "/nowhere", "/*",
]  # fmt: skip
PATHS = [*ENDPOINTS, *OTHER_PATHS]
FIELDS = [
    "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n",
    "best_of", "seed", "stop", "stream", "stream_options", "logit_bias", "logprobs", "top_logprobs",
    "echo", "suffix", "user", "top_k", "min_p", "timeout", "tools", "repetition_penalty", "tokens",
    "stop_token_ids", "ignore_eos", "min_tokens", "truncate_prompt_tokens", "model", "text",
    "return_token_ids", "response_format", "regex", "choice", "cache_salt", "nonsense",
]  # fmt: skip
ODD_VALUES = [
    "NaN", "-Infinity", "1e999", "-1e999", "1e-999", "0.1e1", "-0", "00", "1.", "true", "null",
    "9223372036854775808", "-9223372036854775809", "18446744073709551616", "[]", "{}", "[null]",
    "[[]]", "[[],[]]", "[-1]", "[50257]", "[true]", "[1.5]", r'"\ud800"', r'"\udc00\ud800"',
    r'"\u0000"', '"\u0000"', '"a\nb"', '"\ufeff"', r'{"\ud800": 1}', '{"1": 1, "1": 2}',
    '{"-1": 1}', '{"99999": 1}', '{"1": 1e999}', '[{"role": "user"}]', '"<|endoftext|>"',
    '[{"role": "user", "content": [{"type": "text"}]}]', '[{"role": "", "content": null}]',
    '{"type": "json_object"}', '"("', '"(a*)*b"',
]  # fmt: skip


def mostly(ordinary: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> Any:
    return st.integers(0, 9).flatmap(lambda n: other if n > 7 else ordinary)


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + "1" + closing * depth


# Texts of JSON values, right and wrong ones.
ODD_JSON = st.one_of(
    st.builds(nested, st.integers(1, 5000), st.just("["), st.just("]")),
    st.builds(nested, st.integers(1, 2000), st.just('{"a":'), st.just("}")),
    st.integers(1, 6000).map(lambda digits: "9" * digits),
    st.sampled_from(ODD_VALUES),
    st.text(max_size=50).map(json.dumps),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=10,
    ).map(json.dumps),
)


@st.composite
def objects(draw: st.DrawFn, path: str) -> bytes:
    """A valid request with a few fields changed, of which some may be there twice."""
    model = {} if path.startswith("/admin") else {"model": "gettysburg"}
    valid = {**model, **ENDPOINTS.get(path, {})}
    lacks = draw(mostly(st.just([]), st.lists(st.sampled_from([*valid, "nonsense"]))))
    fields = [(name, json.dumps(value)) for name, value in valid.items() if name not in lacks]
    names = st.sampled_from([*valid, *FIELDS])
    fields += draw(st.lists(st.tuples(names, ODD_JSON), max_size=2))
    body = ", ".join(f'"{name}": {value}' for name, value in fields)
    return f"{{{body}}}".encode("utf-8", "surrogatepass")


@st.composite
def mangled(draw: st.DrawFn, path: str) -> bytes:
    body, at = draw(objects(path)), draw(st.integers(0, 100))
    return body[:at] + draw(st.binary(max_size=5)) + body[at:]


def bodies(path: str) -> st.SearchStrategy[bytes]:
    others = st.one_of(
        mangled(path),
        ODD_JSON.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=200),
        st.integers(1, 60_000).map(lambda size: b" " * size),
    )
    strategy: st.SearchStrategy[bytes] = mostly(objects(path), others)
    return strategy


VALUES = st.text(string.printable[:95] + "\t\x80\xe9\xff", max_size=200).map(str.strip)
RESERVED = {"content-length", "transfer-encoding", "connection", "host", "expect", "upgrade", "te"}
OTHER_NAMES = st.text(string.ascii_letters + "-_", min_size=1, max_size=30).filter(
    lambda name: name.lower() not in RESERVED
)
KNOWN_NAMES = st.sampled_from(
    ["authorization", "x-request-id", "x-session-id", "origin", "cookie", "accept", "range"]
)
TYPES = st.tuples(
    st.just("content-type"), st.sampled_from(["text/plain", "application/json;x", ""])
)
HEADERS = st.lists(TYPES | st.tuples(KNOWN_NAMES | OTHER_NAMES, VALUES), max_size=6)
METHODS = st.sampled_from(["POST", "GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"])
ODD_PATHS = st.lists(
    st.sampled_from([*PATHS, "/", "..", "%00", "%ff", "%2f", "%ed%a0%80", "?", "=", "&", "x;y"]),
    max_size=5,
).map(lambda parts: "/" + "".join(parts).lstrip("/"))
JSON = ("content-type", "application/json")


@st.composite
def requests_of_any_kind(draw: st.DrawFn) -> Request:
    """Mostly a POST of JSON to where one is welcome."""
    path = draw(mostly(st.sampled_from(list(ENDPOINTS)), st.sampled_from(OTHER_PATHS) | ODD_PATHS))
    usual = "POST" if path in ENDPOINTS else "GET"
    headers = draw(mostly(st.just([JSON]), HEADERS))
    return draw(mostly(st.just(usual), METHODS)), path, headers, draw(bodies(path))


def test_over_http(fuzzed: Server) -> None:
    """On one connection, until the server closes it."""
    num_sent = 0
    connection = http.client.HTTPConnection(fuzzed.url.removeprefix("http://"), timeout=PATIENCE)

    @settings(NO_LIMITS, max_examples=1200)
    @given(requests_of_any_kind(), st.booleans())
    def send(asked: Request, is_chunked: bool) -> None:
        nonlocal num_sent
        method, target, headers, body = asked
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value.encode("latin-1"))
        name = "transfer-encoding" if is_chunked else "content-length"
        connection.putheader(name, "chunked" if is_chunked else str(len(body)))
        connection.endheaders(body, encode_chunked=is_chunked)
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        seen = Seen(answer.status, found, answer.read())
        num_sent += 1
        if method != "HEAD":
            check(seen, asked, may_time_out=b'"timeout"' in body)

    send()
    connection.close()
    is_fine(fuzzed)
    assert num_sent >= MIN_OVER_HTTP


def test_in_process(fuzzed: Server) -> None:
    """The app alone, as a server would call it that checks less than ours."""
    num_sent = 0

    async def call(asked: Request, path: str, pieces: list[int]) -> Seen:
        method, target, headers, body = asked
        chunks = [body[a:b] for a, b in zip([0, *pieces], [*pieces, len(body)], strict=True)]
        messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
        messages[-1]["more_body"] = False
        told: list[Any] = []
        ended = asyncio.Event()

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            told.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": target.encode(),
            "query_string": b"a=%ff&b",
            "root_path": "",
            "headers": [
                (b"host", b"localhost"),
                *((name.lower().encode(), value.encode("latin-1")) for name, value in headers),
            ],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 80),
        }
        await fuzzed.app(scope, receive, send)
        ended.set()
        found = {name.decode(): value.decode("latin-1") for name, value in told[0]["headers"]}
        return Seen(told[0]["status"], found, b"".join(m.get("body", b"") for m in told[1:]))

    paths = mostly(st.none(), st.text(max_size=30).map(lambda text: f"/{text}"))
    lengths = mostly(st.just([]), st.text(max_size=30).map(lambda n: [("content-length", n)]))

    with asyncio.Runner() as runner:

        @settings(NO_LIMITS, max_examples=3200)
        @given(
            requests_of_any_kind(),
            paths,
            lengths,
            st.lists(st.integers(0, 100), max_size=3).map(sorted),
        )
        def send(
            asked: Request, path: str | None, length: list[tuple[str, str]], pieces: list[int]
        ) -> None:
            nonlocal num_sent
            method, target, headers, body = asked
            length = [(n, v.encode("ascii", "replace").decode()) for n, v in length]
            with_length = (method, target, headers + length, body)
            seen = runner.run(call(with_length, path or target.partition("?")[0], pieces))
            num_sent += 1
            check(seen, (with_length, path), may_time_out=b'"timeout"' in body)

        send()
    is_fine(fuzzed)
    assert num_sent >= MIN_IN_PROCESS
