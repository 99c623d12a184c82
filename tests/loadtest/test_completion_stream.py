"""Streams read with a clock that the tests turn: exact numbers, and every way to be wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest

from loadtest.errors import MAX_MESSAGE_CHARACTERS, HostError, error_message
from loadtest.measurement import Measurement
from loadtest.sse import Event, read_events
from loadtest.stream import CompletionStream
from loadtest.workload import Workload
from tests.loadtest.stand_in import event, good_parts, token, usage

pytestmark = pytest.mark.loadtest

Script = Sequence[str | float]  # text to deliver, or seconds that pass


class Clock:
    """A clock that stands still except for the seconds in a script."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def play(self, script: Script) -> Iterator[bytes]:
        for part in script:
            if isinstance(part, str):
                yield from part.encode("utf-8").splitlines(keepends=True)
            else:
                self.now += part


def read(script: Script, num_prompt: int = 322, num_decode: int = 3) -> Measurement:
    clock = Clock()
    return CompletionStream(Workload(num_prompt, num_decode), clock).read(clock.play(script))


def fails(script: Script, num_decode: int = 3) -> str:
    with pytest.raises(HostError) as caught:
        read(script, num_decode=num_decode)
    return str(caught.value)


FIRST, SECOND, LAST = token("a"), token("b"), token("c", "length")
USAGE, DONE = usage(322, 3), event("[DONE]")


def test_the_numbers_follow_from_the_definitions() -> None:
    measured = read([0.5, FIRST, 0.25, SECOND, 0.25, LAST, 1.0, USAGE, 1.0, DONE, 9.0])
    assert measured.time_to_first_token_ms == 500
    assert measured.prefill_tokens_per_second == 322 / 0.5
    assert measured.decode_tokens_per_second == 2 / 0.5
    assert measured.request_ms == 3000
    assert measured.num_bytes == len(FIRST + SECOND + LAST + USAGE + DONE)


def test_cached_prompt_tokens_are_not_prefilled() -> None:
    measured = read([0.5, FIRST, 0.5, SECOND, 0.5, LAST, usage(322, 3, num_cached=320), DONE])
    assert measured.prefill_tokens_per_second == 2 / 0.5


def test_a_prompt_wholly_from_the_cache_has_no_prefill_rate() -> None:
    measured = read([0.5, FIRST, 0.5, LAST, usage(322, 3, num_cached=322), DONE])
    assert measured.prefill_tokens_per_second is None
    assert measured.time_to_first_token_ms == 500


def test_one_token_has_no_decode_rate() -> None:
    measured = read([0.5, token("a", "length"), usage(322, 1), DONE], num_decode=1)
    assert measured.decode_tokens_per_second is None
    assert measured.prefill_tokens_per_second == 322 / 0.5


def test_the_count_is_the_usages_and_not_the_events() -> None:
    measured = read([1.0, FIRST, 1.0, LAST, USAGE, DONE])  # two events, three tokens
    assert measured.decode_tokens_per_second == 2 / 1.0


def test_an_opening_event_without_text_is_no_token() -> None:
    measured = read([0.1, token(""), 0.4, FIRST, 0.5, LAST, USAGE, DONE])
    assert measured.time_to_first_token_ms == 500


def test_token_ids_without_text_are_a_token() -> None:
    half = event({"choices": [{"text": "", "token_ids": [447], "finish_reason": None}]})
    assert read([0.1, half, 0.4, FIRST, LAST, USAGE, DONE]).time_to_first_token_ms == (
        pytest.approx(100)
    )


def test_the_finish_reason_is_the_last_token_even_without_text() -> None:
    measured = read([0.5, FIRST, 0.5, token("", "length"), USAGE, DONE])
    assert measured.decode_tokens_per_second == 2 / 0.5


def test_usage_in_the_last_token_event_and_in_every_event_both_work() -> None:
    running = event({"choices": [{"text": "b"}], "usage": {"prompt_tokens": 322}, "error": None})
    assert read([0.5, FIRST, 0.5, running, LAST, USAGE, DONE]).num_generated_tokens == 3


def test_a_longer_prompt_than_was_sent_counts_as_the_host_says() -> None:
    measured = read([0.5, FIRST, 0.5, LAST, usage(323, 3), DONE])  # it put a token in front
    assert measured.prefill_tokens_per_second == 323 / 0.5


def test_an_error_event_fails_with_its_message() -> None:
    error = event({"error": {"message": "over `timeout`", "type": "timeout", "code": None}})
    assert fails([0.5, FIRST, error]) == "error within the stream: over `timeout`"
    assert fails([FIRST, error, DONE]) == "error within the stream: over `timeout`"
    assert fails(["event: error\ndata: no more\n\n"]) == "error within the stream: no more"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([FIRST, 0.1, LAST, USAGE], "ended without [DONE]"),
        ([FIRST, 0.1, LAST, USAGE, "data: [DONE]\n"], "ended without [DONE]"),
        ([], "ended without [DONE]"),
        ([FIRST, 0.1, LAST, DONE], "no usage, though include_usage was set"),
        ([FIRST, 0.1, LAST, event({"choices": [], "usage": None}), DONE], "no usage"),
        ([FIRST, 0.1, LAST, usage(322, 2), DONE], "asked for 3 tokens, the host generated 2"),
        ([FIRST, 0.1, LAST, usage(322, 4), DONE], "asked for 3 tokens, the host generated 4"),
        ([FIRST, 0.1, LAST, usage(100, 3), DONE], "sent 322 prompt tokens, the host's usage says"),
        ([FIRST, 0.1, LAST, usage(322, 3, 323), DONE], "323 cached of 322 prompt tokens"),
        ([USAGE, DONE], "no event of the stream carries a token"),
        ([token("abc", "length"), USAGE, DONE], "all 3 tokens came in one event"),
        ([event("{"), DONE], "no JSON object: '{'"),
        ([event([1]), DONE], "no JSON object: '[1]'"),
        ([event({"choices": 7}), DONE], "choices is no list of objects: 7"),
        ([event({"choices": ["a"]}), DONE], "choices is no list of objects"),
        ([event({"usage": 7}), DONE], "usage is no object: 7"),
    ],
)
def test_a_stream_that_is_wrong_measures_nothing(script: Script, message: str) -> None:
    assert message in fails(script)


@pytest.mark.parametrize("count", [None, -1, True, "3", 3.0])
def test_a_usage_that_is_no_count_fails(count: object) -> None:
    broken = event({"usage": {"prompt_tokens": 322, "completion_tokens": count}})
    assert "usage.completion_tokens is" in fails([FIRST, 0.1, LAST, broken, DONE])


def test_reads_on_after_done_so_that_the_connection_can_be_kept() -> None:
    clock = Clock()
    lines = clock.play([0.1, FIRST, 0.1, LAST, USAGE, DONE, ": bye\n"])
    CompletionStream(Workload(num_decode_tokens=3), clock).read(lines)
    assert list(lines) == []


def test_the_stand_in_speaks_what_is_read_here() -> None:
    body = Workload(num_decode_tokens=5).body("gpt2")
    parts = [p for p in good_parts(body, 0.5, 0.25) if not hasattr(p, "wait")]
    assert read([p for p in parts if isinstance(p, str | float)], num_decode=5).request_ms == 1500


def test_events_follow_the_standard() -> None:
    text = ": comment\r\nid: 7\r\nevent: x\r\ndata:one\r\ndata:  two\r\n\r\n\n\ndata\n\ndata: cut"
    events = list(read_events(text.encode().splitlines(keepends=True), lambda: 5.0))
    assert events == [Event("x", "one\n two", 5.0), Event("message", "", 5.0)]


def test_an_event_arrives_with_its_data_line() -> None:
    clock = Clock()
    events = list(read_events(clock.play(["data: a\n", 2.0, "\n"]), clock))
    assert [e.arrived_at for e in events] == [1000.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no such model", "code": "model_not_found"}}', "no such model"),
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "flat", "code": 400}', "flat"),
        (b'{"detail": []}', '{"detail": []}'),
        (b"<html>Bad gateway\xff</html>\n", "<html>Bad gateway\ufffd</html>"),
        (b"", "(no body)"),
        (json.dumps([1]).encode(), "[1]"),
    ],
)
def test_the_message_of_an_error_body(body: bytes, message: str) -> None:
    assert error_message(body) == message


def test_a_long_message_is_cut() -> None:
    assert len(str(HostError("x" * 10_000))) == MAX_MESSAGE_CHARACTERS
