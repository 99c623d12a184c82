"""Other clients that people have, unmodified: litellm and langchain-openai."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

from tests.api.conftest import PATIENCE, SPEECH, Server, running, speaking

pytestmark = pytest.mark.api

CONTINUATION = SPEECH.removeprefix("Four score")
ANSWER = " good day to you"


class Answer(BaseModel):
    """What a test wants of a model."""

    is_kind: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Goes on with SPEECH, and answers a greeting with ANSWER."""
    with running(speaking(SPEECH, f"User: hi\nAssistant:{ANSWER}\nUser:")) as started:
        yield started


def test_litellm(server: Server) -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.api.litellm_asks", f"{server.url}/v1"],
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout.splitlines()[-1])
    assert Answer.model_validate_json(found.pop("structured"))
    assert found == {
        "chat": [ANSWER] * 2,
        "logprobs": [" good", " day", " to", " you"],
        "chat stream": ANSWER,
        "finish_reason": ["stop"],
        "total_tokens": [20, 13],
        "text": " and seven years",
        "text stream": " and seven years",
        "unknown model": "NotFoundError",
        "too long": "ContextWindowExceededError",
        "tools": "BadRequestError",
    }


def test_langchain_chat(server: Server) -> None:
    chat = ChatOpenAI(
        model="gettysburg",
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        temperature=0,
        max_retries=0,
        stream_usage=True,
    )
    answer = chat.invoke("hi")
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    chunks = list(chat.stream("hi"))
    assert "".join(str(chunk.content) for chunk in chunks) == ANSWER
    assert [c.usage_metadata["input_tokens"] for c in chunks if c.usage_metadata] == [6]
    assert asyncio.run(chat.ainvoke([("system", "be kind"), ("user", "hi")])).content == ""
    assert isinstance(chat.with_structured_output(Answer).invoke("hi"), Answer)
    logged = chat.bind(logprobs=True).invoke("hi")
    tokens = [entry["token"] for entry in logged.response_metadata["logprobs"]["content"]]
    assert tokens == [" good", " day", " to", " you"]


def test_langchain_completion(server: Server) -> None:
    llm = OpenAI(
        model="gettysburg",
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        temperature=0,
        max_tokens=50,
        n=2,
        best_of=2,
        max_retries=0,
    )
    found = llm.generate(["Four score", "Four"])
    assert [[g.text for g in texts] for texts in found.generations] == [
        [CONTINUATION] * 2,
        [f" score{CONTINUATION}"] * 2,
    ]
    stream = llm.bind(n=1, best_of=1).stream("Four score")
    assert "".join(stream) == CONTINUATION
