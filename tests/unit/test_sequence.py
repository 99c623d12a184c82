"""A sequence's own arithmetic: what is pending, when it ends and why, and where its time went."""

from __future__ import annotations

from collections import Counter

import pytest

from serve.engine import SamplingParams, Timings
from serve.engine.sequence import Sequence

pytestmark = pytest.mark.unit


def make(num_generated: int = 0, **params: object) -> Sequence:
    sequence = Sequence(0, (5, 6, 7), SamplingParams(**params), arrived=10.0)  # type: ignore[arg-type]
    for n in range(num_generated):
        sequence.append(n)
    return sequence


def test_counts() -> None:
    sequence = make(max_tokens=9)
    assert (sequence.num_prompt_tokens, sequence.num_generated, sequence.num_pending) == (3, 0, 3)
    sequence.num_computed = 3
    for token_id in (5, 8, 8):
        sequence.append(token_id)
    assert (sequence.num_prompt_tokens, sequence.num_generated, sequence.num_pending) == (3, 3, 3)
    assert sequence.token_ids == [5, 6, 7, 5, 8, 8]
    assert sequence.prompt_ids == (5, 6, 7)
    assert sequence.output_counts == Counter({8: 2, 5: 1})  # the prompt's 5 is not among them
    assert sequence.num_to_come == 6


def test_it_ends_at_max_tokens() -> None:
    assert [make(n, max_tokens=3).finish_reason() for n in (1, 2, 3)] == [None, None, "length"]


def test_it_ends_at_a_stop_token() -> None:
    stop = frozenset({2, 9})
    assert [make(n, stop_token_ids=stop).finish_reason() for n in (1, 2, 3)] == [None, None, "stop"]
    assert (
        make(3, stop_token_ids=stop, max_tokens=3).finish_reason() == "stop"
    )  # rather than length
    assert make(1).finish_reason() is None
    assert make(1, stop_token_ids=frozenset({5, 6, 7})).finish_reason() is None  # the prompt's


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, True), (2, True), (3, False), (4, False)])
def test_a_stop_token_up_to_min_tokens_is_none(min_tokens: int, expected: bool) -> None:
    sequence = make(3, stop_token_ids=frozenset({2}), min_tokens=min_tokens)
    assert sequence.newest_is_stop() is expected
    assert (sequence.finish_reason() == "stop") is expected


def test_equal_sequences_are_two() -> None:
    assert make() != make()
    assert len({make(), make()}) == 2


@pytest.mark.parametrize(
    ("admitted", "first_token", "expected"),
    [
        (None, None, Timings(6.0, 0.0, 0.0)),
        (12.0, None, Timings(2.0, 4.0, 0.0)),
        (12.0, 15.0, Timings(2.0, 3.0, 1.0)),
        (10.0, 16.0, Timings(0.0, 6.0, 0.0)),
    ],
)
def test_timings(admitted: float | None, first_token: float | None, expected: Timings) -> None:
    sequence = make()
    sequence.admitted, sequence.first_token = admitted, first_token
    assert sequence.timings(16.0) == expected
