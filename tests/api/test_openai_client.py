"""The unmodified `openai` client, sync and async, whole and streamed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from serve.engine import EngineConfig
from tests.api.conftest import PATIENCE, SPEECH, TOKENIZER, Server, encode, running, speaking
from tests.fakes import FakeRunner

pytestmark = pytest.mark.api

CONTINUATION = SPEECH.removeprefix("Four score")


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: OpenAI) -> None:
    answer = client.completions.create(
        model="gettysburg", prompt="Four score", max_tokens=50, temperature=0
    )
    assert answer.object == "text_completion"
    assert answer.model == "gettysburg"
    assert answer.system_fingerprint == "sha256:0123"
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, CONTINUATION, "stop")
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(encode("Four score"))
    assert answer.usage.completion_tokens == len(encode(CONTINUATION)) + 1  # the end of the text
    assert answer.usage.total_tokens == len(encode(SPEECH)) + 1


def test_stream_with_usage(client: OpenAI) -> None:
    with client.completions.create(
        model="gettysburg@cpu:full",
        prompt="Four score",
        max_tokens=3,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        *chunks, last = stream
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == " and seven years"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert {chunk.id for chunk in chunks} == {last.id}
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3


def test_async(server: Server) -> None:
    async def ask() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            whole = await client.completions.create(
                model="gettysburg", prompt="Four score", max_tokens=40, temperature=0
            )
            stream = await client.completions.create(
                model="gettysburg", prompt="Four score", max_tokens=40, temperature=0, stream=True
            )
            pieces = [chunk.choices[0].text async for chunk in stream]
            return whole.choices[0].text, "".join(pieces)

    assert asyncio.run(ask()) == (CONTINUATION, CONTINUATION)


def test_many_at_once(server: Server) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            asked = [
                client.completions.create(
                    model="gettysburg", prompt="Four score", max_tokens=n, temperature=0
                )
                for n in range(1, 15)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    ids = encode(CONTINUATION)
    assert asyncio.run(ask()) == [TOKENIZER.decode(ids[:n]) for n in range(1, 15)]


def test_models(client: OpenAI) -> None:
    names = ["gettysburg", "gettysburg@full", "gettysburg@cpu:full"]
    assert [model.id for model in client.models.list()] == names
    for name in names:
        assert client.models.retrieve(name).id == name


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="gettysburg", prompt="x", max_tokens=1000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.completions.create(model="gettysburg", prompt="x", suffix="y")
    assert unsupported.value.param == "suffix"


def test_full_queue_is_a_rate_limit() -> None:
    with running(speaking(SPEECH), EngineConfig(max_running=1, max_waiting=0)) as server:
        server.runner.gate.clear()
        first = server.post_later(prompt="Four")
        assert server.runner.at_gate.wait(PATIENCE)
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.RateLimitError) as refused,
        ):
            client.completions.create(model="gettysburg", prompt="Four")
        assert refused.value.response.headers["retry-after"] == "1"
        assert server.rejections == 1
        server.runner.gate.set()
        assert first.result().status_code == 200


def test_error_in_the_middle_of_a_stream() -> None:
    may_fail = threading.Event()

    def fail_late(ids: Sequence[int]) -> int:
        if len(ids) > 1:
            assert may_fail.wait(PATIENCE)
            raise RuntimeError("the device is gone")
        return encode(" score")[0]

    with (
        running(FakeRunner(next_token=fail_late)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        client.completions.create(model="gettysburg", prompt="Four", stream=True) as stream,
    ):
        assert next(stream).choices[0].text == " score"
        may_fail.set()
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        assert broken.value.type == "service_unavailable_error"


GREETED = "User: hi\nAssistant: good day to you\nUser:"


class Person(BaseModel):
    """What a test wants of a model."""

    name: Literal["Abe", "Mary"]
    is_president: bool


@pytest.fixture(scope="module")
def greeted() -> Iterator[OpenAI]:
    with (
        running(speaking(GREETED)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_logprobs_echo_and_n(client: OpenAI) -> None:
    answer = client.completions.create(
        model="gettysburg",
        prompt=["Four score", "Four"],
        max_tokens=2,
        temperature=0,
        n=2,
        best_of=2,
        echo=True,
        logprobs=2,
    )
    texts = ["Four score and seven"] * 2 + ["Four score and"] * 2
    assert [choice.text for choice in answer.choices] == texts
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert "".join(logprobs.tokens) == choice.text
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.text_offset is not None
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens)
        assert [choice.text[i] for i in logprobs.text_offset] == [t[0] for t in logprobs.tokens]


def test_chat(greeted: OpenAI) -> None:
    answer = greeted.chat.completions.create(
        model="gettysburg",
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.object == "chat.completion"
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.message.content == " good day to you"
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 4
        assert "".join(entry.token for entry in choice.logprobs.content) == " good day to you"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    again = greeted.chat.completions.create(
        model="gettysburg",
        messages=[
            {"role": "system", "content": "be kind"},
            answer.choices[0].message.model_dump(),  # type: ignore[list-item]  # as people do
            {"role": "user", "content": [{"type": "text", "text": "bye"}]},
        ],
        max_completion_tokens=1,
    )
    assert again.choices[0].finish_reason in ("stop", "length")


def test_chat_stream(greeted: OpenAI) -> None:
    with greeted.chat.completions.create(
        model="gettysburg",
        messages=[{"role": "user", "content": "hi"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    ) as stream:
        first, *chunks, last = stream
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " good day to you"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 4


def test_async_chat(greeted: OpenAI) -> None:
    async def ask() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=greeted.base_url, api_key="x", max_retries=0) as client:
            whole = await client.chat.completions.create(
                model="gettysburg", messages=[{"role": "user", "content": "hi"}], temperature=0
            )
            async with client.chat.completions.stream(
                model="gettysburg", messages=[{"role": "user", "content": "hi"}], temperature=0
            ) as stream:
                final = await stream.get_final_completion()
            return whole.choices[0].message.content, final.choices[0].message.content or ""

    assert asyncio.run(ask()) == (" good day to you", " good day to you")


def test_a_pydantic_model_comes_back(greeted: OpenAI) -> None:
    answer = greeted.chat.completions.parse(
        model="gettysburg",
        messages=[{"role": "user", "content": "hi"}],
        response_format=Person,
        temperature=0,
    )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert person.name in ("Abe", "Mary")


def test_our_own_fields(client: OpenAI) -> None:
    answer = client.completions.create(
        model="gettysburg", prompt="Four", max_tokens=9, extra_body={"regex": "[ab]{3}"}
    )
    assert set(answer.choices[0].text) <= set("ab")


def test_a_chats_errors_are_the_clients_own(greeted: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as tools:
        greeted.chat.completions.create(
            model="gettysburg",
            messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert tools.value.param == "tools"
    assert "GPT-2" in tools.value.message
