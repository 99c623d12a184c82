"""Throughput over the last seconds of busy time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine import ThroughputWindow

pytestmark = pytest.mark.unit


def test_nothing_yet() -> None:
    assert ThroughputWindow().tokens_per_second() == 0


def test_only_the_last_seconds_count() -> None:
    window = ThroughputWindow(10)
    window.add(1000, 5)
    assert window.tokens_per_second() == 200
    window.add(100, 5)
    assert window.tokens_per_second() == 110
    window.add(100, 5)  # the first one is out
    assert window.tokens_per_second() == 20
    window.add(7, 100)  # longer than the window
    assert window.tokens_per_second() == 0.07


def test_steps_without_a_duration() -> None:
    window = ThroughputWindow(1)
    window.add(5, 0)
    assert window.tokens_per_second() == 0
    window.add(5, 2)
    assert window.tokens_per_second() == 2.5


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), min_size=1, max_size=60))
def test_against_looking_at_all_steps(steps: list[tuple[int, int]]) -> None:
    window = ThroughputWindow(10)
    for n, (num_tokens, eighths) in enumerate(steps, 1):
        window.add(num_tokens, eighths / 8)
        first = n - 1  # of the fewest steps that fill the window
        while first and sum(seconds for _, seconds in steps[first:n]) < 80:
            first -= 1
        tokens = sum(num for num, _ in steps[first:n])
        seconds = sum(eighths for _, eighths in steps[first:n]) / 8
        assert window.tokens_per_second() == (tokens / seconds if seconds else 0)
