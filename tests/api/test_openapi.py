"""/openapi.json says what is: every request and answer here fits it, and has nothing besides."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from tests.api.conftest import SPEECH, Server, running, speaking

pytestmark = pytest.mark.api

HI = [{"role": "user", "content": "hi"}]
COMPLETION = {"model": "gettysburg", "prompt": "Four", "temperature": 0}
CHAT = {"model": "gettysburg", "messages": HI, "max_tokens": 3}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
EVERYTHING = {
    "n": 2,
    "stop": ["a", "b"],
    "logit_bias": {"5": 1.5},
    "seed": -1,
    "user": "somebody",
    "top_k": 5,
    "timeout": 60.5,
    "return_token_ids": True,
    "truncate_prompt_tokens": 5,
    "cache_salt": "salt",
}

RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", COMPLETION),
    ("/v1/completions", {**COMPLETION, **EVERYTHING, "logprobs": 2, "echo": True, "best_of": 3}),
    ("/v1/completions", {**COMPLETION, **USAGE, **EVERYTHING, "logprobs": 2, "echo": True}),
    ("/v1/completions", {**COMPLETION, "prompt": [[1], [2]], "stop": "a", "stream": True}),
    ("/v1/completions", {**COMPLETION, "prompt": [1, 2], "regex": "a+", "user": None}),
    ("/v1/completions", {**COMPLETION, "prompt": ["a"], "choice": ["a"], "max_tokens": None}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, **EVERYTHING, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, **USAGE, **EVERYTHING, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "tools": None, "max_tokens": None}),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}, *HI],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
        },
    ),
    ("/tokenize", {"prompt": "Four"}),
    ("/tokenize", {"messages": HI, "return_token_strs": True, "model": "gettysburg"}),
    ("/detokenize", {"tokens": [1, 2]}),
]
WRONG: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/completions", {**COMPLETION, "prompt": 5}, 400),
    ("/v1/completions", {**COMPLETION, "prompt": ""}, 400),
    ("/v1/completions", {**COMPLETION, "prompt": [[1], []]}, 400),
    ("/v1/completions", {**COMPLETION, "prompt": [-1]}, 400),
    ("/v1/completions", {**COMPLETION, "stop": ""}, 400),
    ("/v1/completions", {**COMPLETION, "stop": ["a"] * 17}, 400),
    ("/v1/completions", {**COMPLETION, "stop_token_ids": [-1]}, 400),
    ("/v1/completions", {**COMPLETION, "logit_bias": {"a": 1}}, 400),
    ("/v1/completions", {**COMPLETION, "logit_bias": {"1": 101}}, 400),
    ("/v1/completions", {**COMPLETION, "choice": [""]}, 400),
    ("/v1/completions", {**COMPLETION, "tempreature": 0}, 400),
    ("/v1/completions", {**COMPLETION, "suffix": "a"}, 400),
    ("/v1/completions", {**COMPLETION, "logprobs": 21}, 400),
    ("/v1/completions", {**COMPLETION, "model": "gpt-5"}, 404),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400),
    ("/v1/chat/completions", {**CHAT, "model": "gpt-5"}, 404),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "king", "content": "hi"}]}, 400),
    ("/tokenize", {"prompt": 5}, 400),
    ("/tokenize", {"prompt": "a", "model": "gpt-5"}, 404),
    ("/detokenize", {"tokens": ["a"]}, 400),
    ("/detokenize", {"tokens": [], "model": "gpt-5"}, 404),
]


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    """With nothing left open: an object has the properties that its schema names."""
    found: dict[str, Any] = server.get("/openapi.json").json()
    for schema in found["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return found


def fits(document: dict[str, Any], schema: dict[str, Any], value: object) -> bool:
    whole = {**schema, "components": document["components"]}
    errors = [error.message for error in Draft202012Validator(whole).iter_errors(value)]
    if errors:
        print(errors)
    return not errors


def body_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    content = document["paths"][path]["post"]["requestBody"]["content"]
    schema: dict[str, Any] = content["application/json"]["schema"]
    return schema


def assert_answer_fits(document: dict[str, Any], path: str, answer: httpx.Response) -> None:
    responses = document["paths"][path]["post"]["responses"]
    kind = answer.headers["content-type"].partition(";")[0]
    schema = responses[str(answer.status_code)]["content"][kind]["schema"]
    if kind == "application/json":
        assert fits(document, schema, answer.json())
        return
    *events, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    for event in events:
        assert fits(document, schema, json.loads(event.removeprefix("data: ")))


@pytest.mark.parametrize(("path", "body"), RIGHT)
def test_right_requests(
    server: Server, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    assert fits(document, body_schema(document, path), body)
    answer = server.post_to(path, **body)
    assert answer.status_code == 200, answer.text
    assert_answer_fits(document, path, answer)


@pytest.mark.parametrize(("path", "body", "status"), WRONG)
def test_wrong_requests(
    server: Server, document: dict[str, Any], path: str, body: dict[str, Any], status: int
) -> None:
    assert fits(document, body_schema(document, path), body) == (status == 404)
    answer = server.post_to(path, **body)
    assert answer.status_code == status, answer.text
    assert_answer_fits(document, path, answer)


@pytest.mark.parametrize(("path", "body"), [RIGHT[0], RIGHT[6]])
def test_what_goes_wrong_later(document: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    runner = speaking(SPEECH)
    with running(runner) as server:
        runner.failure = RuntimeError("no such device")
        failed = server.post_to(path, **body)
        runner.gate.clear()
        late = server.post_to(path, **body, timeout=0.01)
    assert [failed.status_code, late.status_code] == [503, 504]
    assert_answer_fits(document, path, failed)
    assert_answer_fits(document, path, late)


def test_every_reference_is_there(document: dict[str, Any]) -> None:
    names = set(document["components"]["schemas"])
    references = set(_references(document))
    assert references
    assert {ref.removeprefix("#/components/schemas/") for ref in references} <= names


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for value in node.values() for ref in _references(value)]
    if isinstance(node, list):
        return [ref for value in node for ref in _references(value)]
    return []
