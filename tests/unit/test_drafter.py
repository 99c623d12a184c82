"""Prompt lookup: what is guessed, and how much of it while it is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.drafter import LONGEST, SHORTEST, Drafter

pytestmark = pytest.mark.unit


def plain(token_ids: Sequence[int], size: int) -> list[int]:
    """By looking at every place, the latest one first; what runs past the end goes on in itself."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for begin in range(len(token_ids) - length - 1, -1, -1):
            if token_ids[begin : begin + length] == token_ids[len(token_ids) - length :]:
                tokens = list(token_ids)
                for n in range(size):
                    tokens.append(tokens[begin + length + n])
                return tokens[len(token_ids) :]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9), st.data())
def test_against_a_plain_search(ids: list[int], size: int, data: st.DataObject) -> None:
    drafter = Drafter(9)
    for end in range(data.draw(st.integers(1, len(ids))), len(ids) + 1):
        assert drafter.guess(ids[:end], size) == plain(ids[:end], size)


@pytest.mark.parametrize(
    ("ids", "guess"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6, 1, 2]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1, 2, 8, 1]),  # the latest place
        ([5, 1, 2, 9, 6, 1, 2, 8, 5, 1, 2], [9, 6, 1, 2, 8]),  # but a longer match first
        ([7, 7, 7], [7, 7, 7, 7, 7]),
        ([7, 7], []),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_guesses(ids: list[int], guess: list[int]) -> None:
    assert Drafter(5).guess(ids, 100) == guess


def test_right_guesses_grow_and_wrong_ones_shrink() -> None:
    drafter, ids = Drafter(8), [1, 2] * 9

    def size() -> int:
        return len(drafter.guess(ids, 100))

    assert size() == 8
    drafter.judge(8, 2)
    assert size() == 3
    drafter.judge(3, 3)
    assert size() == 6
    drafter.judge(6, 6)
    assert size() == 8
    drafter.judge(8, 0)
    assert [size() for _ in range(2)] == [0, 4]
    drafter.judge(4, 4)
    assert size() == 8


def test_guesses_that_are_always_wrong_cost_next_to_nothing() -> None:
    drafter, ids, num_drafted = Drafter(8), [1, 2] * 9, []
    for _ in range(1000):
        size = len(drafter.guess(ids, 100))
        num_drafted.append(size)
        if size:
            drafter.judge(size, 0)
    assert sum(num_drafted[:20]) <= 20
    assert sum(num_drafted[100:]) <= 900 / 30
    assert sum(num_drafted[-100:]) > 0  # it does not give up
