"""Which sequences make the next batch, step by step. The fake runner checks every call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import replace

import numpy as np
import pytest

from serve.engine import Chunk, NullObserver, SamplingParams
from serve.engine.batcher import Batch, Batcher, BatcherConfig
from serve.engine.sequence import Phase, Sequence
from tests.fakes import LIMITS, FakeRunner, hashed

pytestmark = pytest.mark.unit

CONFIG = BatcherConfig(
    max_running=8, prefill_chunk_tokens=16, prefix_sharing=True, max_kept_prefixes=8
)
NEXT = hashed(97)


class Observer(NullObserver):
    """Remembers."""

    def __init__(self) -> None:
        self.lookups: list[tuple[int, int]] = []
        self.num_preemptions = 0

    def on_prefix_lookup(self, num_queried: int, num_hit: int) -> None:
        self.lookups.append((num_queried, num_hit))

    def on_preemption(self) -> None:
        self.num_preemptions += 1


class Steps:
    """A batcher and what the engine does around it, one step at a time, greedily.

    batches: each step's phase, with the tokens that every sequence put in.
    """

    def __init__(
        self, num_pages: int = 64, max_batch: int = 8, mixes: bool = False, **config: object
    ) -> None:
        limits = replace(
            LIMITS,
            num_pages=num_pages,
            max_context=min(200, 4 * num_pages),
            max_batch=max_batch,
            batch_invariant=mixes,
        )
        self._num_pages = num_pages
        self.runner, self.observer = FakeRunner(replace(limits, vocab_size=97)), Observer()
        settings = replace(CONFIG, **config)  # type: ignore[arg-type]
        self.batcher = Batcher(self.runner, settings, self.observer)
        self.batches: list[tuple[str, dict[int, int]]] = []
        self._ids = itertools.count()

    def submit(
        self, prompt: Seq[int], max_tokens: int = 10, share_key: str | None = ""
    ) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        sequence = Sequence(next(self._ids), tuple(prompt), params, share_key)
        self.batcher.submit(sequence)
        return sequence

    def step(self) -> Batch | None:
        batch = self.batcher.next_batch(0.0)
        if batch is not None:
            self._run(batch)
        self.check()
        return batch

    def run(self, num_steps: int | None = None) -> None:
        """So many steps, or until nothing is left to do."""
        steps = itertools.count() if num_steps is None else range(num_steps)
        for n in steps:
            assert n < 10_000, "it never ends"
            if self.step() is None:
                assert num_steps is None
                return

    def check(self) -> None:
        budget, waiting = self.batcher.budget, self.batcher.waiting
        assert waiting.num_tokens == sum(s.num_pending for s in waiting)
        assert waiting.num_completion_tokens == sum(s.num_to_come for s in waiting)
        assert budget.num_free == self.runner.num_free_pages()
        assert budget.num_free + budget.num_used + budget.num_evictable == budget.num_pages
        for sequence in self.batcher.running:
            assert budget.length(sequence.seq_id) == sequence.num_computed
            tokens = sequence.token_ids[: sequence.num_computed]
            assert self.runner.tokens[sequence.seq_id] == tokens

    def _run(self, batch: Batch) -> None:
        sizes = {s.seq_id: n for s, n in zip(batch.sequences, batch.num_tokens, strict=True)}
        self.batches.append((batch.phase, sizes))
        chunks = [
            Chunk(s.seq_id, s.token_ids[s.num_computed : s.num_computed + sizes[s.seq_id]])
            for s in batch.sequences
        ]
        if batch.phase == "prefill":
            logits = self.runner.prefill(chunks)
        else:
            assert all(s.num_pending == 1 for s in batch.sequences)
            newest = [s.token_ids[-1] for s in batch.sequences]
            logits = self.runner.decode([s.seq_id for s in batch.sequences], newest)
        self.batcher.computed(batch)
        for sequence, token_id in zip(batch.sequences, np.argmax(logits, axis=1), strict=True):
            if not sequence.num_pending:
                self._append(sequence, int(token_id))

    def _append(self, sequence: Sequence, token_id: int) -> None:
        assert token_id == NEXT(sequence.token_ids)
        sequence.append(token_id)
        if sequence.finish_reason() is not None:
            self.batcher.finish(sequence)

    def assert_empty(self) -> None:
        """Nothing is held but prefixes, and they can be given up."""
        assert not self.batcher.waiting
        assert not self.batcher.running
        assert self.batcher.budget.num_used == 0
        while self.batcher._release_evicted():
            pass
        assert self.runner.tokens == {}
        assert self.runner.num_free_pages() == self.batcher.budget.num_free == self._num_pages


def ids(start: int, length: int) -> list[int]:
    """Prompts with different starts have no common head."""
    return [(start + n) % 97 for n in range(length)]


# -- one batch


def test_nothing_to_do() -> None:
    assert Steps().step() is None


def test_the_life_of_one_sequence() -> None:
    steps = Steps()
    sequence = steps.submit(ids(0, 5), max_tokens=3)
    assert list(steps.batcher.waiting) == [sequence]
    steps.run()
    assert steps.batches == [("prefill", {0: 5}), ("decode", {0: 1}), ("decode", {0: 1})]
    assert sequence.phase is Phase.FINISHED
    assert sequence.num_computed == 7  # nobody needs the last token's keys and values
    steps.assert_empty()


def test_a_long_prompt_comes_in_chunks() -> None:
    steps = Steps()
    steps.submit(ids(0, 40), max_tokens=1)
    steps.run()
    assert steps.batches == [("prefill", {0: 16}), ("prefill", {0: 16}), ("prefill", {0: 8})]


def test_prompts_fill_a_chunk_in_order_of_arrival() -> None:
    steps = Steps()
    for start, length in enumerate((5, 20, 4, 3)):
        steps.submit(ids(start, length), max_tokens=1)
    steps.run()
    assert steps.batches == [
        ("prefill", {0: 5, 1: 11}),
        ("prefill", {1: 9, 2: 4, 3: 3}),
    ]


def test_the_runner_limits_a_chunk_too() -> None:
    steps = Steps(prefill_chunk_tokens=1000)
    steps.submit(ids(0, 100), max_tokens=1)
    steps.run()
    assert [sum(sizes.values()) for _, sizes in steps.batches] == [64, 36]


def test_a_running_stream_waits_for_one_chunk_only() -> None:
    steps = Steps()
    stream = steps.submit(ids(0, 4), max_tokens=12)
    steps.run(2)
    steps.submit(ids(1, 80), max_tokens=2)
    before = len(steps.batches)
    steps.run()
    phases = [phase for phase, _ in steps.batches[before:]]
    assert phases[:10] == ["prefill", "decode"] * 5
    assert stream.num_generated == 12


def test_what_decodes_goes_along_with_a_chunk_where_logits_know_no_batch() -> None:
    steps = Steps(mixes=True)
    streams = [steps.submit(ids(n, 4), max_tokens=5) for n in range(2)]
    steps.run(2)
    late = steps.submit(ids(2, 40), max_tokens=2)
    steps.run()
    assert steps.batches == [
        ("prefill", {0: 4, 1: 4}),
        ("decode", {0: 1, 1: 1}),
        ("prefill", {0: 1, 1: 1, 2: 16}),
        ("prefill", {0: 1, 1: 1, 2: 16}),
        ("prefill", {0: 1, 1: 1, 2: 8}),
        ("decode", {2: 1}),
    ]
    assert [s.num_generated for s in (*streams, late)] == [5, 5, 2]
    steps.assert_empty()


def test_a_mixed_step_stays_within_the_runners_limit() -> None:
    steps = Steps(mixes=True, prefill_chunk_tokens=1000)
    for n in range(7):
        steps.submit(ids(n, 3), max_tokens=5)
    steps.run(1)
    steps.submit(ids(7, 100), max_tokens=1)
    steps.run()
    assert [sum(sizes.values()) for _, sizes in steps.batches[:4]] == [21, 64, 50, 7]


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_a_stream_of_arrivals_starves_nobody(prefix_sharing: bool, mixes: bool) -> None:
    steps = Steps(prefix_sharing=prefix_sharing, mixes=mixes)
    stream = steps.submit(ids(0, 4), max_tokens=30)
    steps.run(1)
    for n in range(58):
        if stream.phase is Phase.FINISHED:
            break
        steps.submit(ids(n, 30), max_tokens=1)
        steps.run(1)
    assert stream.phase is Phase.FINISHED
    if not mixes:
        phases = [phase for phase, sizes in steps.batches]
        assert "prefill,prefill" not in ",".join(phases[:58])


def test_all_decode_together() -> None:
    steps = Steps()
    for start in range(5):
        steps.submit(ids(start, 3), max_tokens=4)
    steps.run()
    assert steps.batches == [
        ("prefill", dict.fromkeys(range(5), 3)),
        *[("decode", dict.fromkeys(range(5), 1))] * 3,
    ]


def test_one_that_ends_makes_room_at_once() -> None:
    steps = Steps(max_running=2)
    first, second, third = (steps.submit(ids(n, 3), max_tokens=2 + n % 2) for n in range(3))
    steps.run(2)
    assert first.phase is Phase.FINISHED
    assert third.phase is Phase.WAITING
    steps.run(1)
    assert steps.batches[-1] == ("prefill", {2: 3})
    assert second.num_generated == 2
    steps.run()
    steps.assert_empty()


@pytest.mark.parametrize(("max_running", "max_batch"), [(3, 8), (8, 3)])
def test_no_more_run_than_may(max_running: int, max_batch: int) -> None:
    steps = Steps(max_running=max_running, max_batch=max_batch)
    for start in range(10):
        steps.submit(ids(start, 2), max_tokens=4)
    widths = []
    while steps.step() is not None:
        widths.append(len(steps.batcher.running))
    assert max(widths) == max(len(sizes) for _, sizes in steps.batches) == 3
    steps.assert_empty()


# -- admission by pages


def test_admission_waits_for_pages_first_come_first_served() -> None:
    steps = Steps(num_pages=10, prefix_sharing=False, prefill_chunk_tokens=64)
    first = steps.submit(ids(0, 24), max_tokens=3)  # 6 pages, and a 7th for what it generates
    big = steps.submit(ids(1, 16), max_tokens=2)  # 4, later 5
    small = steps.submit(ids(2, 4), max_tokens=1)  # would fit, but is not first
    steps.run(1)
    assert big in steps.batcher.running  # 6 + 4 pages: just
    assert small.phase is Phase.WAITING
    steps.run()
    assert [s.num_generated for s in (first, big, small)] == [3, 2, 1]
    steps.assert_empty()


def test_pages_that_the_running_ones_owe_are_not_given_away() -> None:
    steps = Steps(num_pages=10, prefix_sharing=False)
    first = steps.submit(ids(0, 32), max_tokens=1)  # 8 pages, 4 of them in the second chunk
    second = steps.submit(ids(1, 12), max_tokens=1)  # 3 pages
    steps.run(1)
    assert steps.batcher.budget.num_free == 6
    assert (first.phase, second.phase) == (Phase.PREFILL, Phase.WAITING)
    steps.run()
    assert steps.observer.num_preemptions == 0
    assert steps.batches == [("prefill", {0: 16}), ("prefill", {0: 16}), ("prefill", {1: 12})]


def test_the_whole_cache_for_one_sequence() -> None:
    steps = Steps(num_pages=5)
    for start in range(3):
        steps.submit(ids(start, 8), max_tokens=12)
    steps.run()
    assert steps.observer.num_preemptions > 0
    steps.assert_empty()


# -- prefix sharing

HEAD = ids(50, 18)


def cached(steps: Steps, sequence: Sequence) -> int:
    """How many tokens it got from another one, by its own word and by the observer's."""
    assert steps.observer.lookups[-1] == (sequence.num_prompt_tokens, sequence.num_cached)
    return sequence.num_cached


def test_a_kept_parent() -> None:
    steps = Steps()
    steps.submit(HEAD, max_tokens=3)
    steps.run()
    child = steps.submit([*HEAD, 1, 2], max_tokens=1)
    steps.run()
    assert cached(steps, child) == 18
    assert steps.batches[-1] == ("prefill", {1: 2})
    steps.assert_empty()


def test_what_a_parent_generated_can_be_shared() -> None:
    steps = Steps()
    parent = steps.submit(HEAD, max_tokens=5)
    steps.run()
    child = steps.submit([*parent.token_ids, 1], max_tokens=1)
    steps.run()
    assert cached(steps, child) == 18 + 4  # the last one is not in the cache


def test_a_live_parent() -> None:
    steps = Steps(num_pages=64)
    parent = steps.submit(HEAD, max_tokens=20)
    steps.run(4)
    child = steps.submit([*HEAD, 1, 2], max_tokens=10)
    steps.run(1)
    assert parent in steps.batcher.running
    assert cached(steps, child) == 18
    used = steps.batcher.budget.num_used
    assert used == 5 + 1  # 20 tokens each; 4 pages in common
    steps.run()
    steps.assert_empty()


def test_a_live_parent_shares_what_is_computed_so_far() -> None:
    steps = Steps()
    parent = steps.submit(ids(0, 40))
    steps.run(2)
    child = steps.submit([*ids(0, 36), 96])
    steps.run(1)
    assert (parent.num_computed, child.num_cached) == (40, 32)


def test_the_same_prompt_again_computes_one_token() -> None:
    steps = Steps()
    for _ in range(3):
        again = steps.submit(HEAD, max_tokens=2)
        steps.run()
    assert cached(steps, again) == 17
    assert steps.batches[-2] == ("prefill", {2: 1})
    steps.assert_empty()


def test_equal_prompts_at_the_same_time_are_computed_once() -> None:
    steps = Steps()
    sequences = [steps.submit(ids(0, 64), max_tokens=3) for _ in range(4)]
    steps.run()
    num_computed = sum(sum(sizes.values()) for phase, sizes in steps.batches if phase == "prefill")
    assert num_computed == 64 + 3
    assert [s.num_cached for s in sequences] == [0, 63, 63, 63]
    steps.assert_empty()


def test_keys_part_and_none_never_shares() -> None:
    steps = Steps()
    num_cached = []
    for key in ("a", "b", "", None, None, "a", "b", ""):
        sequence = steps.submit(HEAD, max_tokens=2, share_key=key)
        steps.run()
        num_cached.append(cached(steps, sequence))
    assert num_cached == [0, 0, 0, 0, 0, 17, 17, 17]
    steps.assert_empty()


def test_less_than_a_page_is_computed_again() -> None:
    steps = Steps()
    steps.submit(HEAD[:10], max_tokens=1)
    steps.run()
    for length, expected in ((3, 0), (4, 4), (5, 5)):
        child = steps.submit([*HEAD[:length], 1, 2], max_tokens=1)
        steps.run()
        assert cached(steps, child) == expected


def test_without_sharing_nothing_is_shared_kept_or_looked_up() -> None:
    steps = Steps(prefix_sharing=False)
    for _ in range(2):
        sequence = steps.submit(HEAD, max_tokens=2)
        steps.run()
    assert (sequence.num_cached, steps.observer.lookups) == (0, [])
    assert steps.runner.tokens == {}


def test_no_more_is_kept_than_may() -> None:
    steps = Steps(max_kept_prefixes=2)
    for start in range(5):
        steps.submit(ids(start, 8), max_tokens=1)
        steps.run()
    assert steps.runner.tokens.keys() == {3, 4}
    steps.assert_empty()


def test_nothing_is_kept_of_what_may_be_broken() -> None:
    steps = Steps()
    sequence = steps.submit(HEAD)
    steps.run(2)
    steps.batcher.finish(sequence, reusable=False)
    assert steps.runner.tokens == {}
    steps.assert_empty()


def test_an_unfinished_prefill_is_kept_as_far_as_it_came() -> None:
    steps = Steps()
    sequence = steps.submit(ids(0, 40))
    steps.run(1)
    steps.batcher.finish(sequence)
    child = steps.submit(ids(0, 40), max_tokens=1)
    steps.run()
    assert cached(steps, child) == 16
    steps.assert_empty()


# -- eviction


def test_prefixes_make_room_for_the_waiting_the_least_useful_first() -> None:
    steps = Steps(num_pages=8)
    for start in (0, 20, 40):
        steps.submit(ids(start, 8), max_tokens=1)  # 2 pages each
        steps.run()
    steps.submit([*ids(0, 8), 96], max_tokens=1)  # uses the first: the second is next to go
    steps.run()
    assert steps.batcher.budget.num_free == 1  # 3 pages are the fourth's, two of them the first's
    other = steps.submit(ids(60, 12), max_tokens=1)
    steps.run()
    assert other.num_cached == 0
    assert steps.runner.tokens.keys() == {0, 2, 3, 4}
    assert steps.observer.num_preemptions == 0
    steps.assert_empty()


def test_what_is_to_be_shared_is_evicted_last() -> None:
    steps = Steps(num_pages=8)
    for start in (0, 20):
        steps.submit(ids(start, 16), max_tokens=1)
        steps.run()
    assert steps.batcher.budget.num_free == 0
    child = steps.submit([*ids(0, 16), 1, 2, 3, 4], max_tokens=1)
    steps.run()
    assert child.num_cached == 16
    assert 1 not in steps.runner.tokens
    steps.assert_empty()


def test_nothing_is_evicted_in_vain() -> None:
    steps = Steps(num_pages=10)
    steps.submit(ids(0, 16), max_tokens=1)  # keeps 4 pages
    steps.run()
    running = steps.submit(ids(40, 18), max_tokens=2)  # has 5
    child = steps.submit([*ids(0, 16), *ids(70, 12)], max_tokens=1)  # 3 more than it shares
    steps.run(1)
    while running.phase is not Phase.FINISHED:
        assert child.phase is Phase.WAITING
        assert 0 in steps.runner.tokens
        steps.run(1)
    steps.run()
    assert child.num_cached == 16
    steps.assert_empty()


def test_a_prefix_too_big_to_keep_beside_its_child_goes() -> None:
    steps = Steps(num_pages=8)
    steps.submit(ids(0, 30), max_tokens=2)  # 31 tokens: all 8 pages
    steps.run()
    child = steps.submit([*ids(0, 6), *ids(60, 22)], max_tokens=1)  # shares 1 page, needs 7 in all
    steps.run()
    assert child.num_generated == 1
    assert child.num_cached == 0  # 6 + 8 pages would be too many
    steps.assert_empty()


def test_prefixes_are_evicted_though_the_waiting_share_with_a_running_one() -> None:
    """The pages of a live parent are none that evicting could have given."""
    steps = Steps(num_pages=12)
    steps.submit(ids(70, 12), max_tokens=1)  # keeps 3 pages
    steps.run()
    parent = steps.submit(ids(0, 24), max_tokens=20)  # 6 pages, then 7
    steps.run(4)
    assert (steps.batcher.budget.num_free, steps.batcher.budget.num_evictable) == (2, 3)
    child = steps.submit([*ids(0, 24), *ids(60, 10)], max_tokens=1)  # 9 pages, 6 of them shared
    steps.run(1)
    assert parent.phase is Phase.DECODE
    assert child.num_cached == 24
    steps.run()
    assert steps.observer.num_preemptions == 0
    steps.assert_empty()


def test_running_sequences_evict_before_they_preempt() -> None:
    steps = Steps(num_pages=8)
    steps.submit(ids(70, 12), max_tokens=1)
    steps.run()
    for start in (0, 20):
        steps.submit(ids(start, 8), max_tokens=8)  # 4 pages each in the end
    steps.run()
    assert steps.observer.num_preemptions == 0
    steps.assert_empty()


# -- preemption


def test_the_newest_goes_back_to_the_head_of_the_queue() -> None:
    steps = Steps(num_pages=8, prefix_sharing=False, max_running=3)
    old, middle, new = (steps.submit(ids(n, 8), max_tokens=16) for n in range(3))  # 6 pages
    last = steps.submit(ids(3, 4), max_tokens=1)
    while not steps.observer.num_preemptions:
        steps.run(1)
    assert new.phase is Phase.WAITING
    assert new.num_computed == 0
    assert list(steps.batcher.waiting) == [new, last]
    assert steps.batcher.running == [old, middle]
    steps.run()
    assert [s.num_generated for s in (old, middle, new, last)] == [16, 16, 16, 1]
    steps.assert_empty()


def test_several_preempted_at_once_keep_their_order() -> None:
    steps = Steps(num_pages=12, prefix_sharing=False)
    sequences = [steps.submit(ids(n, 8), max_tokens=40) for n in range(4)]
    order: list[list[Sequence]] = []
    while steps.step() is not None:
        order.append([*steps.batcher.running, *steps.batcher.waiting])
    assert steps.observer.num_preemptions > 3
    for line in order:  # oldest first, always
        assert line == sequences[len(sequences) - len(line) :]
    steps.assert_empty()


def test_what_was_generated_is_computed_again_and_not_generated_again() -> None:
    steps = Steps(num_pages=6, prefix_sharing=False)
    old, new = (steps.submit(ids(n, 8), max_tokens=10) for n in range(2))
    while not steps.observer.num_preemptions:
        steps.run(1)
    num_generated = new.num_generated
    assert num_generated > 0
    admitted = new.admitted
    while new.phase is Phase.WAITING:
        steps.run(1)
    assert steps.batches[-1] == ("prefill", {new.seq_id: 8 + num_generated})
    steps.run()
    assert (old.num_generated, new.num_generated) == (10, 10)
    assert new.admitted == admitted
    steps.assert_empty()


def test_preempted_in_the_middle_of_its_prefill() -> None:
    steps = Steps(num_pages=10, prefix_sharing=False, prefill_chunk_tokens=4)
    steps.submit(ids(0, 11), max_tokens=25)
    steps.run(4)  # 12 tokens, 3 pages
    new = steps.submit(ids(1, 24), max_tokens=1)  # 6 of the 7 others, which it will lack soon
    while not steps.observer.num_preemptions:
        steps.run(1)
        assert new.num_generated == 0
    assert new.phase is Phase.WAITING
    steps.run()
    assert new.num_generated == 1
    steps.assert_empty()


def test_a_preempted_sequence_counts_its_lookup_once_and_reports_its_first_prefix() -> None:
    steps = Steps(num_pages=8)
    steps.submit(ids(0, 8), max_tokens=1)
    steps.run()
    old, new = (steps.submit([*ids(0, 8), 90 + n], max_tokens=16) for n in range(2))
    steps.run()
    assert steps.observer.num_preemptions > 0
    assert [hit for _, hit in steps.observer.lookups] == [0, 8, 8]
    assert (old.num_cached, new.num_cached) == (8, 8)
    steps.assert_empty()


# -- taking sequences out


@pytest.mark.parametrize("num_steps", range(6))
def test_finishing_at_any_moment(num_steps: int) -> None:
    steps = Steps(max_running=2)
    sequences = [steps.submit(ids(n, 20), max_tokens=3) for n in range(3)]
    steps.run(num_steps)
    for sequence in sequences:
        if sequence.phase is not Phase.FINISHED:
            steps.batcher.finish(sequence)
        assert sequence.phase is Phase.FINISHED
        steps.check()
    assert steps.step() is None
    steps.assert_empty()


def test_a_preempted_sequence_can_be_taken_out() -> None:
    steps = Steps(num_pages=6)
    sequences = [steps.submit(ids(n, 8), max_tokens=10) for n in range(2)]
    while not steps.observer.num_preemptions:
        steps.run(1)
    steps.batcher.finish(sequences[1])
    steps.run()
    assert sequences[0].num_generated == 10
    steps.assert_empty()


def test_a_runner_that_cannot_hold_one_sequence_is_refused() -> None:
    limits = replace(LIMITS, num_pages=2, max_context=9)
    with pytest.raises(AssertionError, match="always fits"):
        Batcher(FakeRunner(limits), CONFIG, NullObserver())
