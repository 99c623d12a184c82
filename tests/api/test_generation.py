"""A choice's text is the same however its tokens come, and never holds a part of a stop string."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.choice import Choice, Wanted
from serve.engine import Engine, FinishEvent, SamplingParams, Stream, TokenEvent
from serve.errors import EngineError
from tests.api.conftest import TOKENIZER
from tests.fakes import FakeRunner

pytestmark = pytest.mark.api

TEXTS = st.text("ab 😀é", max_size=30)
STOPS = st.lists(st.text("ab 😀é", min_size=1, max_size=4), max_size=3)


def silent_stream() -> Stream:
    """A stream of an engine that is not running; the tests say what it says."""

    async def submit() -> Stream:
        return Engine(FakeRunner()).submit([1], SamplingParams())

    return asyncio.run(submit())


STREAM = silent_stream()


def choice(stop: Sequence[str] = (), min_tokens: int = 0) -> Choice:
    return Choice(0, [1], STREAM, TOKENIZER, Wanted(stop, min_tokens))


@settings(deadline=None)
@given(TEXTS, STOPS, st.data())
def test_the_text_ends_where_a_stop_string_begins(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    ids = TOKENIZER.encode(text)
    made, pieces = choice(stop), []
    for token_id in ids:
        made.accept(TokenEvent(token_id))
        if data.draw(st.booleans()):
            pieces.append(made.take()[0])
    made.accept(FinishEvent("length", 1, len(ids)))
    pieces.append(made.take()[0])
    expected, reason = _reference(text, stop)
    assert "".join(pieces) == expected
    assert made.finish_reason == reason
    assert not made.has_news


def _reference(text: str, stop: list[str]) -> tuple[str, str]:
    """The stop string that is complete first wins; among those the longest."""
    for end in range(1, len(text) + 1):
        complete = [len(s) for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(complete)], "stop"
    return text, "length"


def test_nothing_counts_after_a_stop_string() -> None:
    made = choice(["b"])
    for text in "abab":
        made.accept(TokenEvent(TOKENIZER.encode(text)[0]))
    made.accept(FinishEvent("cancelled", 1, 4))
    assert made.take()[:2] == ("a", TOKENIZER.encode("a") + TOKENIZER.encode("b"))
    assert (made.num_generated, made.finish_reason) == (2, "stop")


def test_the_tokens_up_to_min_tokens_may_hold_a_stop_string() -> None:
    made = choice(["a"], min_tokens=2)
    for text in "aaba":
        made.accept(TokenEvent(TOKENIZER.encode(text)[0]))
    assert made.take()[0] == "aab"
    assert (made.num_generated, made.finish_reason) == (4, "stop")


def test_a_stop_string_in_what_the_end_makes_certain() -> None:
    made = choice(["�"])
    made.accept(TokenEvent(TOKENIZER.encode("😀")[0]))
    assert not made.has_news
    made.accept(FinishEvent("length", 1, 1))
    assert (made.take()[0], made.finish_reason) == ("", "stop")


def test_an_end_that_nobody_asked_for_is_an_error() -> None:
    with pytest.raises(EngineError):
        choice().accept(FinishEvent("cancelled", 1, 0))
    with pytest.raises(EngineError, match="broken"):
        choice().accept(FinishEvent("error", 1, 0, error=EngineError("broken")))


def test_an_error_after_the_text_is_complete_is_none_of_the_clients() -> None:
    made = choice(["a"])
    made.accept(TokenEvent(TOKENIZER.encode("a")[0]))
    made.accept(FinishEvent("error", 1, 1, error=EngineError("too late")))
    assert made.finish_reason == "stop"
