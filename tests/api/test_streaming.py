"""What /v1/completions streams."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from serve.api.responses import CompletionResponse
from serve.engine import EngineConfig
from tests.api.conftest import PATIENCE, SPEECH, Server, encode, request, running, speaking
from tests.fakes import FakeRunner, Paced

pytestmark = pytest.mark.api

Chunks = list[dict[str, Any]]
SPEECH_IDS = encode(SPEECH)


def texts(chunks: Chunks, index: int = 0) -> list[str]:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [choice["text"] for choice in choices if choice["index"] == index]


class Reader:
    """Reads a streamed completion in a thread of its own."""

    def __init__(self, server: Server, **fields: Any) -> None:
        self.events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._body = request(stream=True, **fields)
        self._url = f"{server.url}/v1/completions"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=PATIENCE) as response:
            for line in response.iter_lines():
                if line:
                    self.events.put(line)
        self.events.put(None)

    def next(self) -> str | None:
        return self.events.get(timeout=PATIENCE)

    def text(self) -> str:
        line = self.next()
        assert line is not None
        text: str = json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text


def test_a_stream_says_what_the_whole_says(server: Server) -> None:
    chunks = server.stream(max_tokens=30)
    [whole] = server.post(max_tokens=30).json()["choices"]
    assert "".join(texts(chunks)) == whole["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert set(reasons[:-1]) <= {None}
    assert reasons[-1] == "stop"


def test_every_chunk_has_the_same_head(server: Server) -> None:
    chunks = server.stream(max_tokens=3, prompt=["Four", "Four score"])
    for chunk in chunks:
        CompletionResponse.model_validate(chunk)
    heads = ("id", "object", "created", "model", "system_fingerprint")
    assert len({tuple(chunk[key] for key in heads) for chunk in chunks}) == 1
    assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_and_without_choices(server: Server) -> None:
    asked: dict[str, Any] = {"prompt": ["Four", "Four score"], "max_tokens": 3}
    *chunks, last = server.stream(stream_options={"include_usage": True}, **asked)
    assert all(chunk["usage"] is None and "timings" not in chunk for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 3
    assert last["usage"]["completion_tokens"] == 6
    assert "timings" in last
    no_usage = server.stream(stream_options={"include_usage": False}, **asked)
    assert not any("usage" in chunk for chunk in no_usage)


def test_several_prompts_in_one_stream(server: Server) -> None:
    chunks = server.stream(prompt=["Four", "no speech", "Four score and"], max_tokens=2)
    assert ["".join(texts(chunks, index)) for index in range(3)] == [
        " score and",
        "",
        " seven years",
    ]
    finished = [
        (choice["index"], choice["finish_reason"])
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["finish_reason"]
    ]
    assert sorted(finished) == [(0, "length"), (1, "stop"), (2, "length")]


def test_token_ids_are_those_of_the_chunk(server: Server) -> None:
    chunks = server.stream(max_tokens=30, return_token_ids=True)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [i for choice in choices for i in choice["token_ids"]] == [*SPEECH_IDS[1:], 50256]
    assert choices[0]["prompt_token_ids"] == SPEECH_IDS[:1]
    assert not any("prompt_token_ids" in choice for choice in choices[1:])


def test_tokens_arrive_as_they_are_made() -> None:
    pace = Paced(SPEECH_IDS)
    with running(FakeRunner(next_token=pace)) as server:
        reader = Reader(server, max_tokens=3)
        for text in (" score", " and", " seven"):
            pace.step()
            assert reader.text() == text
        assert reader.next() == "data: [DONE]"


def test_token_ids_do_not_wait_for_their_text() -> None:
    ids = encode("a😀")
    pace = Paced(ids)
    with running(FakeRunner(next_token=pace)) as server:
        reader = Reader(server, prompt="a", max_tokens=len(ids) - 1, return_token_ids=True)
        for token_id, text in zip(ids[1:], ["", "😀"], strict=True):
            pace.step()
            line = reader.next()
            assert line is not None
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            assert (choice["token_ids"], choice["text"]) == ([token_id], text)


def test_an_emoji_is_never_split() -> None:
    ids = encode("a😀b👩‍👩‍👧é")
    pace = Paced(ids)
    with running(FakeRunner(next_token=pace)) as server:
        reader = Reader(server, prompt="a", max_tokens=len(ids) - 1)
        pace.step(len(ids) - 1)
        pieces = []
        while (line := reader.next()) != "data: [DONE]":
            assert line is not None
            pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    assert "".join(pieces) == "😀b👩‍👩‍👧é"
    assert not any("�" in piece for piece in pieces)


def test_no_part_of_a_stop_string_is_sent() -> None:
    pace = Paced(encode("Four score and seven years ago"))
    with running(FakeRunner(next_token=pace)) as server:
        reader = Reader(server, max_tokens=5, stop=" and seven years")
        pace.step()
        assert reader.text() == " score"
        pace.step(2)  # " and seven" may be the beginning
        assert server.runner.gate.is_set()
        pace.step(2)
        assert reader.text() == ""
        assert reader.next() == "data: [DONE]"


def test_what_only_looked_like_a_stop_string_is_sent_after_all() -> None:
    pace = Paced(encode("Four score and seven years ago"))
    with running(FakeRunner(next_token=pace)) as server:
        reader = Reader(server, max_tokens=4, stop=" and seven days")
        pace.step()
        assert reader.text() == " score"
        pace.step(3)
        assert reader.text() == " and seven years"


def test_an_error_before_the_first_token_has_its_status() -> None:
    def fail(_: Sequence[int]) -> int:
        raise RuntimeError("no such device")

    with running(FakeRunner(next_token=fail)) as server:
        answer = server.post(stream=True)
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/json"
        assert server.post(stream=True, prompt="x" * 5000).status_code == 400


def test_an_error_after_it_is_the_last_event() -> None:
    may_fail = threading.Event()

    def fail_late(ids: Sequence[int]) -> int:
        if len(ids) > 1:
            assert may_fail.wait(PATIENCE)
            raise RuntimeError("the device is gone")
        return SPEECH_IDS[1]

    with running(FakeRunner(next_token=fail_late)) as server:
        reader = Reader(server)
        assert reader.text() == " score"
        may_fail.set()
        assert reader.next() == "event: error"
        line = reader.next()
        assert line is not None
        error = json.loads(line.removeprefix("data: "))["error"]
        assert error["code"] == "engine_unavailable"
        assert reader.next() is None  # and no [DONE]


def test_an_error_of_one_choice_ends_the_others(cancels: Callable[[], None]) -> None:
    may_go_on = threading.Event()

    def fail_second(ids: Sequence[int]) -> int:
        if ids[0] == 3:
            assert may_go_on.wait(PATIENCE)
        elif ids[0] == 2:
            raise RuntimeError("not this one")
        return 7

    # One sequence at a time, so that only the second one's step fails.
    with running(FakeRunner(next_token=fail_second), EngineConfig(max_running=1)) as server:
        answer = server.post_later(prompt=[[1], [2], [3]], max_tokens=5)
        cancels()
        may_go_on.set()
        assert answer.result().status_code == 503
        reasons = [server.finishes.next().reason for _ in range(3)]
    assert reasons == ["length", "error", "cancelled"]


def test_a_first_token_is_awaited_for_every_choice() -> None:
    with running(speaking(SPEECH), EngineConfig(max_running=1)) as server:
        chunks = server.stream(prompt=["Four", "Four score"], max_tokens=2)
    assert "".join(texts(chunks, 0)) == " score and"
    assert "".join(texts(chunks, 1)) == " and seven"


def test_choices_of_several_prompts_keep_their_index(server: Server) -> None:
    asked: dict[str, Any] = {"prompt": ["Four", "Four score"], "n": 2, "max_tokens": 2}
    chunks = server.stream(stream_options={"include_usage": True}, **asked)
    found = ["".join(texts(chunks, index)) for index in range(4)]
    assert found == [" score and"] * 2 + [" and seven"] * 2
    assert chunks[-1]["usage"]["prompt_tokens"] == 3
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_an_echo_comes_with_the_first_token(server: Server) -> None:
    chunks = server.stream(prompt=["Four", "Four score"], echo=True, max_tokens=3)
    assert texts(chunks, 0)[0].startswith("Four score")
    assert "".join(texts(chunks, 0)) == "Four score and seven"
    assert "".join(texts(chunks, 1)) == "Four score and seven years"


def test_an_echo_alone(server: Server) -> None:
    [chunk] = server.stream(prompt="Four score", echo=True, max_tokens=0)
    [choice] = chunk["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Four score", "length")


def test_usage_in_every_chunk(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = server.stream(max_tokens=3, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"]["prompt_tokens"] == 1 for chunk in chunks)
    only = server.stream(max_tokens=3, stream_options={"continuous_usage_stats": True})
    assert all(chunk["choices"] and chunk["usage"] for chunk in only)


def test_time_that_runs_out_in_the_middle() -> None:
    pace = Paced(SPEECH_IDS)
    with running(FakeRunner(next_token=pace)) as server:
        for seconds in (0.1, 1, 10, PATIENCE / 2):  # may be too short even for the first token
            pace.step()
            answer = server.post(max_tokens=9, timeout=seconds, stream=True)
            pace.step()
            assert server.finishes.next().reason == "timeout"
            if answer.status_code == 200:
                break
    *chunks, error, end = answer.text.split("\n\n")
    assert json.loads(chunks[0].removeprefix("data: "))["choices"][0]["text"] == " score"
    name, data = error.split("\n")
    assert (name, end) == ("event: error", "")  # and no [DONE]
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
