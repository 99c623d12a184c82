"""The accounting of pages against a plain model of who holds what, and against the fake runner."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve.engine import Chunk
from serve.engine.kv_budget import KVBudget
from tests.fakes import LIMITS, FakeRunner

pytestmark = pytest.mark.unit


class Page:
    """Somewhere to put tokens; equal to itself alone."""


class Model(RuleBasedStateMachine):
    """Sequences are lists of Page objects; every count is taken anew from all of them."""

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 5))
    def begin(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.budget = KVBudget(num_pages, page_size)
        limits = replace(LIMITS, num_pages=num_pages, page_size=page_size, vocab_size=8)
        self.runner = FakeRunner(replace(limits, max_context=10_000, max_step_tokens=10_000))
        self.ids = itertools.count()
        self.pages: dict[int, list[Page]] = {}
        self.lengths: dict[int, int] = {}
        self.is_retired: dict[int, bool] = {}
        self.add()

    def draw(self, data: st.DataObject, *, only_live: bool) -> int:
        return data.draw(
            st.sampled_from([s for s in self.pages if not (only_live and self.is_retired[s])])
        )

    def has_live(self) -> bool:
        return not all(self.is_retired.values())

    def held(self, *, live: bool) -> set[Page]:
        """The pages of all live or all retired sequences."""
        return {p for s, ps in self.pages.items() if self.is_retired[s] is not live for p in ps}

    @property
    def num_free(self) -> int:
        return self.num_pages - len(self.held(live=True) | self.held(live=False))

    def grow(self, seq_id: int, num_tokens: int) -> None:
        self.lengths[seq_id] += num_tokens
        while len(self.pages[seq_id]) * self.page_size < self.lengths[seq_id]:
            self.pages[seq_id].append(Page())

    @rule()
    def add(self) -> None:
        seq_id = next(self.ids)
        self.budget.add(seq_id)
        self.runner.add(seq_id)
        self.pages[seq_id], self.lengths[seq_id], self.is_retired[seq_id] = [], 0, False

    @precondition(has_live)
    @rule(data=st.data(), num_tokens=st.integers(0, 30))
    def append(self, data: st.DataObject, num_tokens: int) -> None:
        seq_id = self.draw(data, only_live=True)
        room = self.num_free * self.page_size + -self.lengths[seq_id] % self.page_size
        num_tokens = min(num_tokens, room)
        before = self.num_free
        needed = self.budget.needed(seq_id, num_tokens)
        self.budget.append(seq_id, num_tokens)
        if num_tokens:
            self.runner.prefill([Chunk(seq_id, [1] * num_tokens)])
        self.grow(seq_id, num_tokens)
        assert needed == before - self.num_free
        for num_pages in (0, needed, needed + 2):
            room = self.budget.room(seq_id, num_pages)
            assert self.budget.needed(seq_id, room) == num_pages
            assert self.budget.needed(seq_id, room + 1) == num_pages + 1

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.draw(data, only_live=False)
        length, size = self.lengths[parent], self.page_size
        # A part of a page is copied, so it takes a page.
        possible = [n for n in range(1, length + 1) if self.num_free or n % size == 0]
        if not possible:
            return
        num_tokens = data.draw(st.sampled_from(possible))
        child = next(self.ids)
        self.budget.fork(parent, child, num_tokens)
        self.runner.fork(parent, child, num_tokens)
        whole = num_tokens // size
        self.pages[child], self.is_retired[child] = self.pages[parent][:whole], False
        self.lengths[child] = whole * size
        self.grow(child, num_tokens - whole * size)

    @precondition(has_live)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        """Of tokens that nobody else has: no further than the last page that is shared."""
        seq_id = self.draw(data, only_live=True)
        others = {p for s, pages in self.pages.items() if s != seq_id for p in pages}
        shared = sum(page in others for page in self.pages[seq_id])
        length = data.draw(st.integers(shared * self.page_size, self.lengths[seq_id]))
        num_tokens = self.lengths[seq_id] - length
        self.budget.rollback(seq_id, num_tokens)
        self.runner.rollback(seq_id, num_tokens)
        self.lengths[seq_id] = length
        del self.pages[seq_id][-(-length // self.page_size) :]

    @precondition(has_live)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        seq_id = self.draw(data, only_live=True)
        self.budget.retire(seq_id)
        self.is_retired[seq_id] = True

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq_id = self.draw(data, only_live=False)
        self.budget.release(seq_id)
        self.runner.release(seq_id)
        del self.pages[seq_id], self.lengths[seq_id], self.is_retired[seq_id]

    @invariant()
    def counts(self) -> None:
        used, retired = self.held(live=True), self.held(live=False)
        assert self.budget.num_used == len(used)
        assert self.budget.num_evictable == len(retired - used)
        assert self.budget.num_free == self.num_free == self.runner.num_free_pages()
        for seq_id, length in self.lengths.items():
            assert self.budget.length(seq_id) == length

    @precondition(lambda self: self.lengths)
    @invariant()
    def beside(self) -> None:
        evictable = self.held(live=False) - self.held(live=True)
        for seq_id, length in self.lengths.items():
            for num_tokens in {0, length // 2, length}:
                head = self.pages[seq_id][: num_tokens // self.page_size]
                expected = len(evictable - set(head))
                assert self.budget.num_evictable_beside(seq_id, num_tokens) == expected


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


def test_everything_can_be_used_again_and_again() -> None:
    budget = KVBudget(num_pages=3, page_size=4)
    for _ in range(3):
        budget.add(7)
        budget.append(7, 12)
        assert (budget.num_free, budget.num_used, budget.num_evictable) == (0, 3, 0)
        budget.retire(7)
        assert (budget.num_free, budget.num_used, budget.num_evictable) == (0, 0, 3)
        budget.release(7)
        assert (budget.num_free, budget.num_used, budget.num_evictable) == (3, 0, 0)
    budget.add(7)  # this time it is not retired
    budget.append(7, 12)
    budget.release(7)
    assert (budget.num_free, budget.num_used, budget.num_evictable) == (3, 0, 0)


def test_a_fork_makes_a_retired_page_used() -> None:
    budget = KVBudget(num_pages=8, page_size=4)
    budget.add(0)
    budget.append(0, 9)
    budget.retire(0)
    assert (budget.num_used, budget.num_evictable) == (0, 3)
    budget.fork(0, 1, 6)  # shares one page, and copies half of another
    assert (budget.num_used, budget.num_evictable, budget.num_free) == (2, 2, 4)
    assert budget.num_evictable_beside(0, 9) == 1
    budget.release(0)
    assert (budget.num_used, budget.num_evictable, budget.num_free) == (2, 0, 6)
    budget.release(1)
    assert budget.num_free == 8


def test_needed() -> None:
    budget = KVBudget(num_pages=8, page_size=4)
    budget.add(0)
    assert [budget.needed(0, n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    budget.append(0, 3)
    assert [budget.needed(0, n) for n in (0, 1, 2, 5, 6)] == [0, 0, 1, 1, 2]
