"""What /v1/chat/completions answers, whole and streamed. The shipped template, unless another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from serve.api.responses import ChatChunk, ChatResponse
from serve.tokenizer import END_OF_TEXT
from tests.api.conftest import Server, chunks_of, encode, running, speaking
from tests.fakes import LIMITS, FakeRunner

pytestmark = pytest.mark.api

PROMPT = "User: hi\nAssistant:"
SCRIPT = f"{PROMPT} good day to you\nUser: and now?"
ANSWER = " good day to you"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Says ANSWER when it is greeted, and would then go on for the user."""
    with running(speaking(SCRIPT)) as started:
        yield started


def test_every_field_of_the_answer(server: Server) -> None:
    answer = server.chat("hi").json()
    ChatResponse.model_validate(answer, strict=True)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(encode(PROMPT))
    assert set(answer) == {*ChatResponse.model_fields}


def test_the_stream(server: Server) -> None:
    chunks = chunks_of(server.chat("hi", stream=True))
    for chunk in chunks:
        ChatChunk.model_validate(chunk, strict=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == ANSWER
    assert choices[-1]["delta"] == {}
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    heads = ("id", "object", "created", "model", "system_fingerprint")
    assert len({tuple(chunk[key] for key in heads) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_streams_usage(server: Server) -> None:
    options = {"include_usage": True}
    *chunks, last = chunks_of(server.chat("hi", stream=True, stream_options=options))
    assert all(chunk["usage"] is None and "timings" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == len(encode(PROMPT))
    assert "timings" in last


def test_several_choices(server: Server) -> None:
    answer = server.chat("hi", n=2, max_tokens=2).json()
    assert [c["message"]["content"] for c in answer["choices"]] == [" good day"] * 2
    assert answer["usage"]["prompt_tokens"] == len(encode(PROMPT))
    chunks = chunks_of(server.chat("hi", n=2, max_tokens=2, stream=True))
    for index in range(2):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in own) == " good day"
        assert [c["finish_reason"] for c in own][-1] == "length"


def test_token_ids(server: Server) -> None:
    asked: dict[str, Any] = {"return_token_ids": True, "max_tokens": 2}
    [choice] = server.chat("hi", **asked).json()["choices"]
    ids = encode(SCRIPT)[len(encode(PROMPT)) :][:2]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (encode(PROMPT), ids)
    choices = [c["choices"][0] for c in chunks_of(server.chat("hi", stream=True, **asked))]
    assert [c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c] == [encode(PROMPT)]
    assert [i for c in choices for i in c.get("token_ids", [])] == ids


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_limit_by_both_of_its_names(server: Server, limit: str) -> None:
    answer = server.chat("hi", **{limit: 1}).json()
    assert answer["choices"][0]["message"]["content"] == " good"
    assert answer["choices"][0]["finish_reason"] == "length"
    both = server.chat("hi", max_tokens=1, max_completion_tokens=2)
    assert both.json()["error"]["param"] == "max_tokens"
    assert server.chat("hi", max_tokens=2, max_completion_tokens=2).status_code == 200


def test_without_a_limit_what_is_left_of_the_context() -> None:
    with running(FakeRunner(next_token=lambda _: 7)) as server:
        answer = server.chat("hi").json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == LIMITS.max_context


def test_a_conversation_that_fills_the_context(server: Server) -> None:
    for asked in ({}, {"max_tokens": 8}):
        error = server.chat("word " * 300, **asked).json()["error"]
        assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
        assert str(LIMITS.max_context) in error["message"]
    error = server.chat("hi", max_tokens=300).json()["error"]
    assert error["param"] == "max_completion_tokens"
    assert server.chat("word " * 300, truncate_prompt_tokens=4).status_code == 200


def test_who_ignores_the_end_gets_as_many_tokens_as_he_asked_for(server: Server) -> None:
    answer = server.chat("hi", ignore_eos=True, max_tokens=8).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["message"]["content"].startswith(f"{ANSWER}\nUser:")


def test_a_text_of_a_given_form_has_no_other_end(server: Server) -> None:
    for form in ({"choice": ["a\nUser: b"]}, {"regex": r"a\nUser: b"}):
        [choice] = server.chat("hi", **form).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("a\nUser: b", "stop")


def test_own_stop_strings_come_on_top(server: Server) -> None:
    [choice] = server.chat("hi", stop=" day").json()["choices"]
    assert choice["message"]["content"] == " good"
    [choice] = server.chat("hi", stop="nowhere").json()["choices"]
    assert choice["message"]["content"] == ANSWER


def prompt_of(server: Server, messages: list[dict[str, Any]]) -> str:
    tokens = server.post_to("/tokenize", messages=messages).json()["tokens"]
    text: str = server.post_to("/detokenize", tokens=tokens).json()["prompt"]
    return text


def test_messages_of_every_kind(server: Server) -> None:
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": "lines"}]
    answered: dict[str, Any] = {
        "role": "assistant",
        "content": " yes ",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": [],
        "function_call": None,
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": "and kind"},
        {"role": "user", "content": parts, "name": "Abe"},
        answered,
        {"role": "user", "content": ""},
    ]
    assert server.chat(messages=messages).status_code == 200
    assert prompt_of(server, messages) == (
        "System: be brief\nSystem: and kind\nUser: two\nlines\nAssistant: yes\nUser: \nAssistant:"
    )


@pytest.mark.parametrize(
    ("message", "param", "why"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages.role", "tools"),
        ({"role": "function", "content": "x"}, "messages.role", "tools"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            "messages.tool_calls",
            "tools",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.content",
            "image_url",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages.content", "text alone"),
    ],
)
def test_messages_that_are_not_served(
    server: Server, message: dict[str, Any], param: str, why: str
) -> None:
    answer = server.chat(messages=[message])
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    assert why in error["message"]


TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TOOL]),
        ("tools", {}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "now"}}),
        ("functions", [TOOL["function"]]),
        ("function_call", {"name": "now"}),
        ("audio", {"voice": "ash", "format": "wav"}),
    ],
)
def test_fields_that_are_not_served(server: Server, field: str, value: Any) -> None:
    error = server.chat("hi", **{field: value}).json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert "GPT-2" in error["message"]
    assert server.chat("hi", **{field: None}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
        {"tool_choice": "auto", "functions": [], "function_call": "none"},
    ],
)
def test_who_wants_no_tools_gets_none(server: Server, fields: dict[str, Any]) -> None:
    assert server.chat("hi", **fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.content.text"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.content"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.role"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"messages": [{"role": "user", "content": "hi", "mood": None}]}, "messages.mood"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"n": 129}, "n"),
        ({"prompt": "hi"}, "prompt"),
    ],
)
def test_wrong_requests(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = server.chat("hi", **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_an_unknown_model(server: Server) -> None:
    assert server.chat("hi", model="gpt-5").json()["error"]["code"] == "model_not_found"


TEMPLATE = """\
{% if messages[0].role == 'assistant' %}{{ raise_exception('the user speaks first') }}{% endif %}
{% set stop = ['.'] %}
{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"""


def test_a_template_of_ones_own() -> None:
    runner = speaking(f"{END_OF_TEXT}Four score. And", "Four score. And")
    with running(runner, chat_template=TEMPLATE) as server:
        answer = server.chat("Four").json()
        messages = [{"role": "assistant", "content": "hi"}]
        refused = server.chat(messages=messages)
    assert answer["choices"][0]["message"]["content"] == " score"
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"
    assert "the user speaks first" in refused.json()["error"]["message"]


def test_an_error_before_the_first_token_has_its_status() -> None:
    runner = speaking(SCRIPT)
    with running(runner) as server:
        runner.failure = RuntimeError("no such device")
        answer = server.chat("hi", stream=True)
    assert answer.status_code == 503
    assert json.loads(answer.text)["error"]["code"] == "engine_unavailable"
