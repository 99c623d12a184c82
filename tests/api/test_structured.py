"""Structured output: the text is what was asked for, whatever the model would rather say."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from serve.api.schemas import CompletionRequest
from serve.api.structured import grammar_of
from serve.errors import RequestError
from tests.api.conftest import Server, chunks_of

pytestmark = pytest.mark.api

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Abe", "Mary"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


def texts(server: Server, **fields: Any) -> list[str]:
    """The same asked of both endpoints, whole and streamed."""
    fields = {"max_tokens": 100, **fields}
    whole, chat = server.post(**fields), server.chat("hi", **fields)
    for answer in (whole, chat):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
    stream = server.stream(**fields)
    chat_stream = chunks_of(server.chat("hi", stream=True, **fields))
    return [
        whole.json()["choices"][0]["text"],
        chat.json()["choices"][0]["message"]["content"],
        "".join(chunk["choices"][0]["text"] for chunk in stream),
        "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chat_stream),
    ]


@pytest.mark.parametrize("strict", [True, False, None])
def test_a_schema(server: Server, strict: bool | None) -> None:
    form = {**FORMAT, "json_schema": {"name": "person", "schema": SCHEMA, "strict": strict}}
    for text in texts(server, response_format=form):
        found = json.loads(text)
        assert found["name"] in ("Abe", "Mary")
        assert 0 <= found["age"] <= 99
        assert found.keys() == {"name", "age"}


def test_an_object(server: Server) -> None:
    # The fake model has no opinion of JSON; the bias makes it end what it began.
    for text in texts(server, response_format={"type": "json_object"}, logit_bias={"92": 50}):
        assert isinstance(json.loads(text), dict)


def test_a_regular_expression(server: Server) -> None:
    for text in texts(server, regex=r"[a-c]{2}-\d{3}"):
        assert re.fullmatch(r"[a-c]{2}-\d{3}", text)


def test_a_choice(server: Server) -> None:
    for text in texts(server, choice=["yes", "no, never", "vielleicht: é😀"]):
        assert text in ("yes", "no, never", "vielleicht: é😀")


def test_a_special_tokens_text(server: Server) -> None:
    for text in texts(server, choice=["a<|endoftext|>b"]):
        assert text == "a<|endoftext|>b"


def test_a_grammar_that_grows_too_large(server: Server) -> None:
    answer = server.post(regex="a?b(={1,300}){1,300}", logit_bias={"65": 100}, max_tokens=9)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == "The grammar cannot be followed any further: it grows too large"
    assert error["param"] == "regex"


def test_plain_text_is_plain(server: Server) -> None:
    answer = server.post(max_tokens=1, response_format={"type": "text"}).json()
    assert answer["choices"][0]["text"] == " score"


def test_with_everything_else(server: Server) -> None:
    answer = server.post(
        prompt=["Four", "score"],
        n=2,
        best_of=3,
        temperature=1,
        seed=1,
        echo=True,
        logprobs=1,
        regex="[ab]{4}",
    ).json()
    prompts = ["Four"] * 2 + ["score"] * 2
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        assert re.fullmatch(f"{prompt}[ab]{{4}}", choice["text"])
        assert "".join(choice["logprobs"]["tokens"]) == f"{choice['text']}<|endoftext|>"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"choice": ["a"], "response_format": FORMAT}, "choice"),
        ({"regex": "["}, "regex"),
        ({"regex": "a" * 10_000}, "regex"),
        ({"regex": "a{1000000}"}, "regex"),
        ({"regex": "a\\"}, "regex"),
        ({"choice": [""]}, "choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
    ],
)
def test_wrong_requests(server: Server, fields: dict[str, Any], param: str) -> None:
    for answer in (server.post(**fields), server.chat("hi", **fields)):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "colour"},
        {"default": 2**64},
        {"maxLength": 10**30},
        {"x": 10**4000},
        {"pattern": r"\Aa"},
        {"pattern": "a" * 10_000},
    ],
    ids=lambda schema: next(iter(schema)),
)
def test_wrong_schemas(server: Server, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for answer in (
        server.post(response_format=form),
        server.chat("hi", response_format=form),
    ):
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == "response_format"
        assert len(error["message"]) < 500


def test_a_model_without_grammars() -> None:
    asked = CompletionRequest.model_validate({"model": "m", "prompt": "a", "regex": "a"})
    with pytest.raises(RequestError, match="without structured output") as refused:
        asyncio.run(grammar_of(asked, None))
    assert (refused.value.param, refused.value.code) == ("regex", "unsupported_parameter")
