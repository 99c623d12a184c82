"""The longest common head wins; what was useful last stays longest."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine import SamplingParams
from serve.engine.prefix_cache import PrefixCache, common_prefix
from serve.engine.sequence import Sequence

pytestmark = pytest.mark.unit


def make(
    seq_id: int, ids: Seq[int], num_computed: int | None = None, share_key: str | None = ""
) -> Sequence:
    sequence = Sequence(seq_id, tuple(ids), SamplingParams(), share_key)
    sequence.num_computed = len(ids) if num_computed is None else num_computed
    return sequence


def new(*ids: int, share_key: str | None = "") -> Sequence:
    return make(99, ids, 0, share_key)


@given(st.data())
def test_common_prefix(data: st.DataObject) -> None:
    head, a, b = (data.draw(st.lists(st.integers(0, 2), max_size=40)) for _ in range(3))
    first, second = head + a, head + b
    length = common_prefix(first, second)
    assert first[:length] == second[:length]
    assert length == min(len(first), len(second)) or first[length] != second[length]


def test_the_longest_head_wins_wherever_it_is() -> None:
    cache = PrefixCache(8, min_tokens=1)
    cache.keep(make(0, [1, 2, 3]))
    cache.keep(make(1, [1, 2, 4, 5]))
    live = [make(2, [1, 2, 4, 5, 6]), make(3, [1])]

    def find(*ids: int) -> tuple[int, int] | None:
        found = cache.find(new(*ids), live)
        return None if found is None else (found[0].seq_id, found[1])

    assert find(1, 2, 3, 9) == (0, 3)
    assert find(1, 2, 4, 5, 9) == (1, 4)  # a kept one rather than a live one of the same length
    assert find(1, 2, 4, 5, 6, 9) == (2, 5)
    assert find(7, 8, 9) is None


def test_one_token_is_always_left_to_compute() -> None:
    cache = PrefixCache(8, min_tokens=1)
    kept = make(0, [1, 2, 3, 4])
    cache.keep(kept)
    assert cache.find(new(1, 2, 3), []) == (kept, 2)
    assert cache.find(new(1, 2, 3, 4), []) == (kept, 3)
    assert cache.find(new(1), []) is None


def test_only_what_is_computed_can_be_shared() -> None:
    cache = PrefixCache(8, min_tokens=2)
    kept, live = make(0, [1, 2, 3, 4], num_computed=3), make(1, [5, 6, 7, 8], num_computed=2)
    cache.keep(kept)
    assert cache.find(new(1, 2, 3, 4, 5), [live]) == (kept, 3)
    assert cache.find(new(5, 6, 7, 8, 9), [live]) == (live, 2)
    assert not cache.keep(make(2, [1, 1, 1], num_computed=1))


def test_less_than_a_page_is_not_worth_it() -> None:
    cache = PrefixCache(8, min_tokens=4)
    kept = make(0, [1, 2, 3, 4, 5])
    cache.keep(kept)
    assert cache.find(new(1, 2, 3, 9, 9), []) is None
    assert cache.find(new(1, 2, 3, 4), []) is None
    assert cache.find(new(1, 2, 3, 4, 9), []) == (kept, 4)
    assert not cache.keep(make(1, [7, 8, 9]))


def test_keys_part_and_none_never_shares() -> None:
    cache = PrefixCache(8, min_tokens=1)
    a, live = make(0, [1, 2, 3], share_key="a"), make(1, [1, 2, 3], share_key=None)
    assert cache.keep(a)
    assert not cache.keep(make(2, [4, 5], share_key=None))
    assert cache.find(new(1, 2, 3, share_key="a"), [live]) == (a, 2)
    for key in ("", "b", None):
        assert cache.find(new(1, 2, 3, share_key=key), [live]) is None
    assert cache.keep(make(3, [1, 2, 3], share_key="b"))  # another key's does not cover it


def test_a_sequence_is_not_its_own_parent() -> None:
    sequence = make(0, [1, 2, 3])
    assert PrefixCache(8, min_tokens=1).find(sequence, [sequence]) is None


def test_what_another_one_covers_is_not_kept() -> None:
    cache = PrefixCache(8, min_tokens=1)
    assert cache.keep(make(0, [1, 2, 3]))
    assert not cache.keep(make(1, [1, 2, 3]))
    assert not cache.keep(make(2, [1, 2]))
    assert not cache.keep(make(3, [1, 2, 9], num_computed=2))
    assert cache.keep(make(4, [1, 2, 3, 4]))
    assert cache.keep(make(5, [2]))
    assert len(cache) == 3


def test_the_least_recently_useful_goes_first() -> None:
    cache = PrefixCache(3, min_tokens=1)
    for seq_id in range(3):
        cache.keep(make(seq_id, [seq_id, seq_id]))
        assert cache.overflow() is None
    cache.find(new(0, 0), [])
    cache.keep(make(3, [3, 3]))
    assert cache.overflow() == 1
    assert cache.overflow() is None
    assert [cache.evict() for _ in range(4)] == [2, 0, 3, None]
    assert len(cache) == 0


def test_finding_a_live_one_or_nothing_changes_no_order() -> None:
    cache = PrefixCache(3, min_tokens=1)
    cache.keep(make(0, [1]))
    cache.keep(make(1, [2]))
    cache.find(new(1, 5, 6), [make(7, [1, 5])])
    cache.find(new(8, 9), [])
    assert cache.evict() == 0


def test_a_cache_of_nothing() -> None:
    cache = PrefixCache(0, min_tokens=1)
    assert cache.keep(make(5, [1, 2]))
    assert cache.overflow() == 5
    assert len(cache) == 0


@given(st.data())
def test_find_against_looking_at_everything(data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, 1), min_size=1, max_size=8)
    keys = st.sampled_from(["", "a", None])
    min_tokens = data.draw(st.integers(1, 3))
    cache = PrefixCache(100, min_tokens)
    others = []
    for seq_id in range(data.draw(st.integers(0, 8))):
        other = make(seq_id, data.draw(ids), share_key=data.draw(keys))
        other.num_computed = data.draw(st.integers(0, len(other.token_ids)))
        others.append(other)
    kept = [other for other in others[::2] if cache.keep(other)]
    wanted = new(*data.draw(ids), share_key=data.draw(keys))
    found = cache.find(wanted, others[1::2])
    lengths = [
        common_prefix(wanted.token_ids[:-1], other.token_ids[: other.num_computed])
        for other in (*kept, *others[1::2])
        if other.share_key == wanted.share_key is not None
    ]
    longest = max(lengths, default=0)
    if longest < min_tokens:
        assert found is None
    else:
        assert found is not None
        parent, length = found
        assert length == longest
        assert parent.share_key == wanted.share_key
        assert parent.token_ids[:length] == wanted.token_ids[:length]
        assert length <= parent.num_computed
