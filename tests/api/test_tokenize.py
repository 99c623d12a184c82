"""/tokenize and /detokenize, as vLLM's clients know them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import TOKENIZER, Server, encode, running, speaking
from tests.fakes import LIMITS

pytestmark = pytest.mark.api


def test_a_prompt(server: Server) -> None:
    answer = server.post_to("/tokenize", model="gettysburg", prompt="Four score é")
    assert answer.json() == {
        "count": 3,
        "max_model_len": LIMITS.max_context,
        "tokens": encode("Four score é"),
        "token_strs": None,
    }


def test_tokens_as_the_vocabulary_writes_them(server: Server) -> None:
    answer = server.post_to("/tokenize", prompt="Four score é", return_token_strs=True)
    assert answer.json()["token_strs"] == ["Four", "Ġscore", "ĠÃ©"]


def test_messages(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = server.post_to("/tokenize", messages=messages).json()
    assert whole["tokens"] == encode("User: hi\nAssistant:")
    open_end = server.post_to("/tokenize", messages=messages, add_generation_prompt=False).json()
    assert open_end["tokens"] == encode("User: hi\n")
    assert whole["count"] == server.chat("hi").json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize("special", [True, False])
def test_there_are_no_special_tokens_to_add(server: Server, special: bool) -> None:
    answer = server.post_to("/tokenize", prompt="Four", add_special_tokens=special)
    assert answer.json()["tokens"] == encode("Four")


def test_an_empty_prompt_has_no_tokens(server: Server) -> None:
    assert server.post_to("/tokenize", prompt="").json()["tokens"] == []
    assert server.post_to("/detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize("text", ["Four score", "😀 é\n\t", "<|endoftext|>", "word " * 3000])
def test_there_and_back(server: Server, text: str) -> None:
    tokens = server.post_to("/tokenize", prompt=text).json()["tokens"]
    assert server.post_to("/detokenize", tokens=tokens).json()["prompt"] == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "n": 1}, "n"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [TOKENIZER.vocab_size]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
    ],
)
def test_wrong_requests(server: Server, path: str, body: dict[str, Any], param: str) -> None:
    answer = server.post_to(path, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})]
)
def test_models(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.post_to(path, model="gpt-5", **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert server.post_to(path, model="gettysburg@cpu:full", **body).status_code == 200
    with running(speaking("Four")) as empty:
        [model] = empty.models
        empty.models.remove(model)
        answer = empty.post_to(path, **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
