"""One line for each request, without a key and without a word of what was said."""

from __future__ import annotations

import logging
import uuid
from typing import Any

import httpx
import pytest

from serve.api.auth import Keys
from tests.api.conftest import PATIENCE, SPEECH, Server, request, running, speaking, until

pytestmark = pytest.mark.api

KEY = "sk-alice-0123"


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def fields(caplog: pytest.LogCaptureFixture, logger: str, request_id: str) -> dict[str, Any]:
    """Of the one line with this id, which may come after the answer."""

    def found() -> list[dict[str, Any]]:
        all_fields = [
            vars(record)["fields"] for record in list(caplog.records) if record.name == logger
        ]
        return [f for f in all_fields if f["request_id"] == request_id]

    until(lambda: bool(found()))
    [line] = found()
    return line


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """All that a server would have logged: not httpx, nor what pytest switches on in uvicorn."""
    ours = [r for r in caplog.records if r.name.startswith(("serve.", "uvicorn.error"))]
    return "".join(f"{record.getMessage()} {vars(record)}\n" for record in ours)


def ask(server: Server, method: str, path: str, **kwargs: Any) -> tuple[httpx.Response, str]:
    """The answer, and the request's id."""
    request_id = uuid.uuid4().hex
    headers = {"x-request-id": request_id, **kwargs.pop("headers", {})}
    url = server.url + path
    answer = httpx.request(method, url, headers=headers, timeout=PATIENCE, **kwargs)
    return answer, request_id


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/health", "/health", 200),
        ("HEAD", "/health", "/health", 200),
        ("GET", "/v1/models/gettysburg@full?secret=1", "/v1/models/{name:path}", 200),
        ("GET", "/secret", "unknown", 404),
        ("POST", "/health", "/health", 405),
    ],
)
def test_a_request(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    route: str,
    status: int,
) -> None:
    _, request_id = ask(server, method, path)
    line = fields(caplog, "serve.access", request_id)
    assert line.pop("seconds") > 0
    assert line == {"request_id": request_id, "method": method, "route": route, "status": status}
    assert "secret" not in logged(caplog)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_has_its_tokens(
    server: Server, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    body = request(prompt="Four score and", max_tokens=2, stream=stream)
    answer, request_id = ask(server, "POST", "/v1/completions", json=body)
    assert answer.status_code == 200
    line = fields(caplog, "serve.access", request_id)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 2)


def test_a_key_is_told_by_its_fingerprint(caplog: pytest.LogCaptureFixture) -> None:
    keys = Keys([KEY])
    with running(speaking(SPEECH), api_keys=keys) as server:
        headers = {"authorization": f"Bearer {KEY}"}
        _, good = ask(server, "GET", "/v1/models", headers=headers)
        _, bad = ask(server, "GET", "/v1/models", headers={"authorization": "Bearer guessed"})
        assert fields(caplog, "serve.access", good)["key"] == keys.find(KEY.encode())
        assert "key" not in fields(caplog, "serve.access", bad)
    assert KEY not in logged(caplog)
    assert "guessed" not in logged(caplog)


def test_no_text_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running(speaking(SPEECH)) as server:
        assert " seven years" in server.post(prompt="Four score and", max_tokens=2).text
        server.post(prompt="Four score and", nonsense=1)
        server.stream(prompt="Four score and", max_tokens=2)
    assert "serve.access" in logged(caplog)
    assert "score" not in logged(caplog)
    assert "seven" not in logged(caplog)


def test_texts_are_logged_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with running(speaking(SPEECH), log_prompts=True) as server:
        body = request(prompt="Four score and", max_tokens=2, stream=True)
        _, request_id = ask(server, "POST", "/v1/completions", json=body)
        texts = fields(caplog, "serve.texts", request_id)
        assert "Four score and" in texts["request"]
        assert " seven" in texts["answer"]
        assert texts["answer"].endswith("data: [DONE]\n\n")
        _, request_id = ask(server, "GET", "/metrics")
        fields(caplog, "serve.access", request_id)
        assert sum(record.name == "serve.texts" for record in caplog.records) == 1
