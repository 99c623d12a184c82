"""The rules of /v1/completions, field by field."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serve.api.errors import ErrorResponse
from tests.api.conftest import PATIENCE, TOKENIZER, Server, request

pytestmark = pytest.mark.api

VOCAB = TOKENIZER.vocab_size
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "timeout",
)
INTEGERS = (
    "max_tokens",
    "top_k",
    "seed",
    "min_tokens",
    "n",
    "best_of",
    "logprobs",
    "truncate_prompt_tokens",
)
BOOLEANS = ("ignore_eos", "return_token_ids", "stream", "echo")
STRINGS = ("user", "cache_salt", "suffix", "model", "regex")


def error_of(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.post(**fields)
    assert answer.status_code == 400, answer.text
    ErrorResponse.model_validate_json(answer.text, strict=True)
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, "0.5") for field in NUMBERS),
        *((field, True) for field in NUMBERS),
        *((field, [1]) for field in NUMBERS),
        *((field, "5") for field in INTEGERS),
        *((field, True) for field in INTEGERS),
        *((field, 1.0) for field in INTEGERS),
        *((field, 1) for field in BOOLEANS),
        *((field, "true") for field in BOOLEANS),
        *((field, 5) for field in STRINGS),
        ("logit_bias", [1]),
        ("logit_bias", {"1": "5"}),
        ("logit_bias", {"1": True}),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop", {"a": 1}),
        ("stop_token_ids", 5),
        ("stop_token_ids", [True]),
        ("stop_token_ids", ["5"]),
        ("response_format", "json_object"),
        ("choice", "yes"),
        ("choice", [1]),
        ("prompt", 5),
        ("prompt", True),
        ("prompt", {"text": "a"}),
        ("prompt", [1, True]),
        ("prompt", [1, "a"]),
        ("prompt", [1, 1.5]),
        ("prompt", [[1], "a"]),
        ("prompt", [[1], [[1]]]),
        ("prompt", ["a", None]),
    ],
)
def test_wrong_types(server: Server, field: str, value: object) -> None:
    assert error_of(server, **{field: value})["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("top_k", -2),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
        ("max_tokens", 0),  # without echo
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("min_tokens", 17),  # over max_tokens
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("logit_bias", {"1": 100.1}),
        ("logit_bias", {"1": -101}),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1.5": 1}),
        ("logit_bias", {"²": 1}),
        ("logit_bias", {str(VOCAB): 1}),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", "a" * 1001),
        ("stop_token_ids", [VOCAB]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(129))),
        ("n", 0),
        ("n", 129),
        ("best_of", 0),
        ("best_of", 129),
        ("logprobs", -1),
        ("logprobs", 21),
        ("truncate_prompt_tokens", 0),
        ("timeout", 0),
        ("timeout", -1),
        ("user", "u" * 257),
        ("regex", ""),
        ("regex", "("),
        ("choice", []),
        ("choice", [""]),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "text", "json_schema": {"name": "a", "schema": {}}}),
        ("cache_salt", ""),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", ""]),
        ("prompt", [[1], []]),
        ("prompt", [VOCAB]),
        ("prompt", [-1]),
        ("prompt", [[1], [VOCAB]]),
        ("prompt", None),
    ],
)
def test_wrong_values(server: Server, field: str, value: object) -> None:
    assert error_of(server, **{field: value})["param"] == field


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2, "seed": 1},
        {"top_p": 1},
        {"top_p": 1e-9, "temperature": 1},
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 1},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1.3},
        {"max_tokens": 1},
        {"min_tokens": 16},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"logit_bias": {"0": -100, "50256": 100}},
        {"logit_bias": {}},
        {"stop": ["a"] * 16},
        {"stop": []},
        {"stop_token_ids": [0, VOCAB - 1]},
        {"user": ""},
        {"cache_salt": "s"},
        {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logprobs": None},
        {"max_tokens": 0, "echo": True},
        {"logprobs": 20},
        {"n": 3, "best_of": 3, "stream": True},
        {"truncate_prompt_tokens": 1},
        {"timeout": 60, "user": "u" * 256},
        {"response_format": {"type": "text"}},
        {"stream_options": None},
        {"prompt": "😀"},
    ],
)
def test_right_values(server: Server, fields: dict[str, Any]) -> None:
    answer = server.post(**fields)
    assert answer.status_code == 200, answer.text


def test_nothing_can_be_put_in_the_middle(server: Server) -> None:
    error = error_of(server, suffix="x")
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    assert "infill" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "best_of": 2},
        {"n": 1, "best_of": 2, "stream": True},
    ],
)
def test_best_of_is_at_least_n_and_waits_for_the_end(
    server: Server, fields: dict[str, Any]
) -> None:
    assert error_of(server, **fields)["param"] == "best_of"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": ["a"] * 2, "best_of": 65}, "best_of"),
    ],
)
def test_too_many_sequences(server: Server, fields: dict[str, Any], param: str) -> None:
    error = error_of(server, **fields)
    assert (error["param"], error["code"]) == (param, "too_many_sequences")
    assert "128" in error["message"]


def test_unknown_fields_are_named(server: Server) -> None:
    error = error_of(server, tempreature=1)
    assert (error["param"], error["code"]) == ("tempreature", "unknown_parameter")
    assert "tempreature" in error["message"]
    assert error_of(server, tempreature=None)["param"] == "tempreature"
    error = error_of(server, stream=True, stream_options={"include_useage": True})
    assert error["param"] == "stream_options.include_useage"


def test_stream_options_need_a_stream(server: Server) -> None:
    assert error_of(server, stream_options={})["param"] == "stream_options"
    assert error_of(server, stream=True, stream_options=[])["param"] == "stream_options"
    wrong = {"include_usage": 1}
    param = error_of(server, stream=True, stream_options=wrong)["param"]
    assert param == "stream_options.include_usage"


def test_required_fields(server: Server) -> None:
    for field in ("model", "prompt"):
        body = request()
        del body[field]
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field
        assert answer.json()["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(server: Server, number: str) -> None:
    body = f'{{"model": "gettysburg", "prompt": "a", "temperature": {number}}}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(
        f"{server.url}/v1/completions", content=body, headers=headers, timeout=PATIENCE
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "temperature"


def test_integers_may_be_huge_in_the_json_only(server: Server) -> None:
    assert error_of(server, max_tokens=10**30)["param"] == "max_tokens"
    assert error_of(server, prompt=[10**30])["param"] == "prompt"


LONGEST = 10**4300 - 1  # of what JSON's reader takes; one more, and Python writes it no more


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": LONGEST},
        {"min_tokens": LONGEST},
        {"top_k": LONGEST},
        {"truncate_prompt_tokens": 2**63},
        {"stop_token_ids": [LONGEST]},
        {"prompt": [LONGEST]},
        {"prompt": [[-(2**63) - 1]]},
        {"seed": LONGEST},
        {"n": LONGEST},
    ],
    ids=lambda field: str(*field),
)
def test_integers_without_end(server: Server, field: dict[str, Any]) -> None:
    assert error_of(server, **field)["param"] == next(iter(field))
