"""Whatever goes wrong, the client gets one small JSON in OpenAI's form, with the right status."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from serve.api import errors
from serve.api.errors import MAX_BODY_BYTES, ErrorResponse
from serve.errors import (
    BodyTooLargeError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    InvalidKeyError,
    LocalOnlyError,
    ModelNotFoundError,
    OverloadedError,
    RequestError,
    TokenizerError,
)
from tests.api.conftest import PATIENCE, Server, request, running, speaking

pytestmark = pytest.mark.api

JSON = {"content-type": "application/json"}


def post(server: Server, body: bytes, headers: dict[str, str] = JSON) -> httpx.Response:
    url = f"{server.url}/v1/completions"
    return httpx.post(url, content=body, headers=headers, timeout=PATIENCE)


def test_the_table() -> None:
    found = {
        type(error).__name__: (errors.answer(error).status, errors.answer(error).code)
        for error in (
            RequestError("x", "prompt"),
            ContextLengthError(5, 5, 8),
            ModelNotFoundError("x", ["y"]),
            OverloadedError("x", 1),
            InvalidKeyError("x"),
            LocalOnlyError("x"),
            BodyTooLargeError(5),
            DeadlineError(1),
            EngineError("x"),
            TokenizerError("x"),
            RuntimeError("x"),
        )
    }
    assert found == {
        "RequestError": (400, "invalid_value"),
        "ContextLengthError": (400, "context_length_exceeded"),
        "ModelNotFoundError": (404, "model_not_found"),
        "OverloadedError": (429, "rate_limit_exceeded"),
        "InvalidKeyError": (401, "invalid_api_key"),
        "LocalOnlyError": (403, "local_only"),
        "BodyTooLargeError": (413, "body_too_large"),
        "DeadlineError": (504, "deadline_exceeded"),
        "EngineError": (503, "engine_unavailable"),
        "TokenizerError": (500, "internal"),  # the request's own are turned into RequestError
        "RuntimeError": (500, "internal"),
    }


@pytest.mark.parametrize(("seconds", "header"), [(0.0, "1"), (1.0, "1"), (1.2, "2"), (60, "60")])
def test_retry_after_is_an_integer_and_never_too_early(seconds: float, header: str) -> None:
    answer = errors.answer(OverloadedError("full", seconds))
    assert answer.headers == {"Retry-After": header}


def test_only_what_will_pass_is_worth_another_try() -> None:
    assert errors.answer(EngineError("a step has failed")).headers == {"Retry-After": "5"}
    assert errors.answer(EngineError("draining", "draining")).headers == {"Retry-After": "5"}
    assert errors.answer(EngineError("dead", "engine_dead")).headers == {}


@pytest.mark.parametrize("letter", ["a", "\n", "😀", "\ud800", "é"])
def test_a_body_is_small_and_one_json(letter: str) -> None:
    body = errors.answer(RequestError(letter * 10_000, letter * 10_000)).body()
    assert len(body) <= MAX_BODY_BYTES
    error = json.loads(body)["error"]
    assert error["message"].startswith(letter)
    assert error["param"].startswith(letter)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"not json", b'{"model": }', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}'],
)
def test_malformed_json(server: Server, body: bytes) -> None:
    answer = post(server, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("body", "invalid_json")


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"5", b"null", b"true"])
def test_a_body_that_is_no_object(server: Server, body: bytes) -> None:
    answer = post(server, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "body"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_content_that_is_not_called_json(server: Server, kind: str | None) -> None:
    answer = post(server, json.dumps(request()).encode(), {"content-type": kind} if kind else {})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_content_type"


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 400), ("identity", 200)])
def test_a_compressed_body(server: Server, encoding: str, status: int) -> None:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    answer = post(server, json.dumps(request()).encode(), headers)
    assert answer.status_code == status
    if status == 400:
        assert answer.json()["error"]["code"] == "invalid_content_type"
        assert "'gzip'" in answer.json()["error"]["message"]


def test_content_type_may_have_a_charset(server: Server) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert post(server, json.dumps(request()).encode(), headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("POST", "/v1/completions/", 404, "unknown_url"),
        ("GET", "/v1/models/", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/gettysburg", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt-5", 404, "model_not_found"),
    ],
)
def test_wrong_urls(server: Server, method: str, path: str, status: int, code: str) -> None:
    answer = httpx.request(method, server.url + path, timeout=PATIENCE)
    assert answer.status_code == status
    ErrorResponse.model_validate_json(answer.text, strict=True)
    assert answer.json()["error"]["code"] == code
    assert ("allow" in answer.headers) == (status == 405)


def test_an_unknown_model_is_told_the_known_ones(server: Server) -> None:
    answer = server.post(model="gpt-5")
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    for name in ("gpt-5", "gettysburg", "gettysburg@cpu:full"):
        assert name in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unforeseen_error_is_logged_and_not_told(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(speaking("Four")) as server:

        def broken(*_: object) -> None:
            raise ZeroDivisionError("secret")

        monkeypatch.setattr(server.engine, "submit", broken)
        answer = server.post(stream=stream)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    assert "x-request-id" in answer.headers
    [record] = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert "secret" in str(record.exc_info[1])


def test_our_own_invalid_answer_is_no_client_error() -> None:
    class Small(BaseModel):
        number: int

    with pytest.raises(ValidationError) as found:
        Small.model_validate({"number": "x"})
    assert errors.answer(found.value).status == 500


def test_openapi_describes_the_endpoint_and_its_errors(server: Server) -> None:
    document = server.get("/openapi.json").json()
    operation = document["paths"]["/v1/completions"]["post"]
    schemas = document["components"]["schemas"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/CompletionRequest"}
    assert {"prompt", "max_tokens", "cache_salt"} <= set(schemas["CompletionRequest"]["properties"])
    assert schemas["CompletionRequest"]["required"] == ["model", "prompt"]
    envelope = {"$ref": "#/components/schemas/ErrorResponse"}
    for status in ("400", "404", "429", "503", "default"):
        content = operation["responses"][status]["content"]
        assert content["application/json"]["schema"] == envelope
    assert "422" not in operation["responses"]
    assert set(operation["responses"]["200"]["content"]) == {
        "application/json",
        "text/event-stream",
    }
    references = set(_references(document))
    assert references
    assert all(ref.removeprefix("#/components/schemas/") in schemas for ref in references)


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [ref for value in node.values() for ref in _references(value)]
    if isinstance(node, list):
        return [ref for value in node for ref in _references(value)]
    return []
