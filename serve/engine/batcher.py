"""Choose the next batch. Knows sequences and the KV budget.

Calls the runner only to open, cut and close sequences.

Order of life: waiting -> prefill (in chunks) -> decode -> finished. When pages run out, the prefix
cache is evicted first; then the newest running sequence goes back to the head of the queue and is
computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from serve.engine.drafter import Drafter
from serve.engine.kv_budget import KVBudget
from serve.engine.prefix_cache import PrefixCache
from serve.engine.runner import ModelRunner
from serve.engine.sequence import Phase, Sequence
from serve.engine.stats import EngineObserver, PhaseName
from serve.engine.waiting import WaitingQueue

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatcherConfig:
    """See EngineConfig."""

    max_running: int
    prefill_chunk_tokens: int
    prefix_sharing: bool
    max_kept_prefixes: int
    speculative_tokens: int = 0


@dataclass(frozen=True)
class Batch:
    """The sequences of one model call, and how many pending tokens of each it takes.

    A "prefill" may take one token of decoding sequences too. drafts: guesses of what comes after a
    decoding sequence's token, computed along with it.
    """

    phase: PhaseName
    sequences: Seq[Sequence]
    num_tokens: Seq[int]
    drafts: Mapping[Sequence, Seq[int]] = field(default_factory=dict)

    @property
    def verifies(self) -> bool:
        """Whether somebody needs the logits after every token, not just after the last."""
        return bool(self.drafts) or any(s.prompt_logprobs is not None for s in self.sequences)

    @property
    def sizes(self) -> list[int]:
        """How many tokens of each sequence go in, its draft included."""
        items = zip(self.sequences, self.num_tokens, strict=True)
        return [n + len(self.drafts.get(s, ())) for s, n in items]


class Batcher:
    """Owns the queue, the running set, the budget and the prefix cache."""

    def __init__(
        self, runner: ModelRunner, config: BatcherConfig, observer: EngineObserver
    ) -> None:
        limits = runner.limits
        self._runner, self._config, self._observer = runner, config, observer
        assert limits.max_context <= limits.num_pages * limits.page_size, "a sequence always fits"
        self.max_running = min(config.max_running, limits.max_batch)
        self._max_step_tokens = min(config.prefill_chunk_tokens, limits.max_step_tokens)
        self._mixes = limits.batch_invariant and limits.max_step_tokens >= limits.max_batch
        self.budget = KVBudget(limits.num_pages, limits.page_size)
        self._prefixes = PrefixCache(config.max_kept_prefixes, limits.page_size)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of admission
        self._last_phase: PhaseName = "decode"
        self._speculative_tokens = config.speculative_tokens if limits.batch_invariant else 0
        if self._speculative_tokens < config.speculative_tokens:
            log.warning("no speculative decoding: these logits depend on what else is in the call")

    def submit(self, sequence: Sequence) -> None:
        if self._speculative_tokens:
            sequence.drafter = Drafter(self._speculative_tokens)
        self.waiting.append(sequence)

    def next_batch(self, now: float) -> Batch | None:
        """A prefill chunk or a decode step.

        While there is work for both, one call does both, if that changes nobody's logits: it reads
        the weights once. Otherwise they alternate.
        """
        while True:
            self._admit(now)
            if not self.running:
                return None
            batch = self._choose()
            if self._make_room(batch):
                self._last_phase = batch.phase
                return self._with_drafts(batch) if batch.phase == "decode" else batch
            # Somebody was preempted: choose again.

    def _choose(self) -> Batch:
        prefilling = [s for s in self.running if s.phase is Phase.PREFILL]
        decoding = [s for s in self.running if s.phase is Phase.DECODE]
        if not prefilling:
            return Batch("decode", decoding, [1] * len(decoding))
        if self._mixes:
            return self._prefill_batch(prefilling, decoding)
        if decoding and self._last_phase == "prefill":
            return Batch("decode", decoding, [1] * len(decoding))
        return self._prefill_batch(prefilling, [])

    def computed(self, batch: Batch) -> None:
        """The runner has put the batch's tokens into the KV cache, drafts included."""
        for sequence, num_tokens, size in zip(
            batch.sequences, batch.num_tokens, batch.sizes, strict=True
        ):
            self.budget.append(sequence.seq_id, size)
            sequence.num_computed += num_tokens
            if not sequence.num_pending:
                sequence.phase = Phase.DECODE

    def settle(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """So much of its draft was right, and is in token_ids; take the rest out of the cache."""
        assert sequence.drafter is not None
        sequence.drafter.judge(num_drafted, num_accepted)
        sequence.num_computed += num_accepted
        if num_accepted < num_drafted:
            self.budget.rollback(sequence.seq_id, num_drafted - num_accepted)
            self._runner.rollback(sequence.seq_id, num_drafted - num_accepted)

    def finish(self, sequence: Sequence, reusable: bool = True) -> None:
        """Take the sequence out; its pages stay as a prefix to share, if they can (`reusable`)."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._close(sequence, reusable)
        sequence.phase = Phase.FINISHED
        sequence.drafter = sequence.constraint = None  # a kept prefix needs neither

    def _close(self, sequence: Sequence, reusable: bool) -> None:
        if reusable and self._config.prefix_sharing and self._prefixes.keep(sequence):
            self.budget.retire(sequence.seq_id)
            overflow = self._prefixes.overflow()
            if overflow is not None:
                self._release(overflow)
        else:
            self._release(sequence.seq_id)

    def _release(self, seq_id: int) -> None:
        self.budget.release(seq_id)
        self._runner.release(seq_id)

    def _admit(self, now: float) -> None:
        """First come, first served, while pages are left that no running sequence needs.

        Not before the next prefill step has room, so that equal prompts find what the first of them
        has computed.
        """
        while self.waiting and self._has_room_for_one():
            sequence = self.waiting.head
            parent, shared = self._find_prefix(sequence)
            missing = self._missing_pages(sequence, shared)
            if missing > self._num_evictable(parent, shared):
                return
            if missing > 0:
                self._release_evicted()
                continue  # the prefix may be what was evicted: look again
            self.waiting.pop()
            self._open(sequence, parent, shared)
            self._admitted(sequence, shared, now)

    def _has_room_for_one(self) -> bool:
        to_prefill = sum(s.num_pending for s in self.running if s.phase is Phase.PREFILL)
        return len(self.running) < self.max_running and to_prefill < self._max_step_tokens

    def _find_prefix(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """Another's head; none for a sequence whose client wants the logits after every token."""
        if not self._config.prefix_sharing or sequence.prompt_logprobs is not None:
            return None, 0
        return self._prefixes.find(sequence, self.running) or (None, 0)

    def _missing_pages(self, sequence: Sequence, shared: int) -> int:
        """Pages to find for the whole sequence and for what the running ones owe.

        Without the latter, one that was just preempted would come back at once, and again.
        """
        owed = sum(self.budget.needed(s.seq_id, s.num_pending) for s in self.running)
        own = self.budget.pages_for(len(sequence.token_ids)) - shared // self.budget.page_size
        return owed + own - self.budget.num_free

    def _num_evictable(self, parent: Sequence | None, shared: int) -> int:
        """Pages that evicting can free while those to be shared stay."""
        if parent is None:
            return self.budget.num_evictable
        return self.budget.num_evictable_beside(parent.seq_id, shared)

    def _open(self, sequence: Sequence, parent: Sequence | None, shared: int) -> None:
        if parent is None:
            self.budget.add(sequence.seq_id)
            self._runner.add(sequence.seq_id)
        else:
            self.budget.fork(parent.seq_id, sequence.seq_id, shared)
            self._runner.fork(parent.seq_id, sequence.seq_id, shared)

    def _admitted(self, sequence: Sequence, shared: int, now: float) -> None:
        sequence.num_computed = shared
        sequence.phase = Phase.PREFILL
        self.running.append(sequence)
        if sequence.admitted is None:  # not after a preemption
            sequence.admitted, sequence.num_cached = now, shared
            if self._config.prefix_sharing:
                self._observer.on_prefix_lookup(sequence.num_prompt_tokens, shared)

    def _prefill_batch(self, prefilling: Seq[Sequence], decoding: Seq[Sequence]) -> Batch:
        """A chunk of what is to prefill, and the decoding sequences' newest tokens with it."""
        left = min(self._max_step_tokens, self._runner.limits.max_step_tokens - len(decoding))
        taken = [(sequence, 1) for sequence in decoding]
        for sequence in prefilling:
            if not left:
                break
            num_tokens = min(sequence.num_pending, left)
            taken.append((sequence, num_tokens))
            left -= num_tokens
        return Batch("prefill", [s for s, _ in taken], [n for _, n in taken])

    def _with_drafts(self, batch: Batch) -> Batch:
        """A decode batch with guesses, as many as its call and the free pages have room for."""
        room = self._runner.limits.max_step_tokens - len(batch.sequences)
        num_free = self.budget.num_free
        num_free -= sum(self.budget.needed(s.seq_id, 1) for s in batch.sequences)
        drafts = {}
        for sequence in batch.sequences:
            needed = self.budget.needed(sequence.seq_id, 1)
            at_most = self.budget.room(sequence.seq_id, needed + num_free) - 1
            draft = self._guess(sequence, min(room, at_most))
            if draft:
                drafts[sequence] = draft
                room -= len(draft)
                num_free -= self.budget.needed(sequence.seq_id, 1 + len(draft)) - needed
        return replace(batch, drafts=drafts)

    def _guess(self, sequence: Sequence, at_most: int) -> list[int]:
        """Of those that may be generated; a token comes after the last of them."""
        at_most = min(at_most, sequence.num_to_come - 1)
        if sequence.drafter is None or at_most <= 0:
            return []
        draft = sequence.drafter.guess(sequence.token_ids, at_most)
        if not draft or sequence.constraint is None:
            return draft
        try:
            return draft[: sequence.constraint.allowed(draft)]
        except Exception:  # if it is broken, that shows when the next token is chosen
            log.exception("sequence %d: no draft", sequence.seq_id)
            return []

    def _make_room(self, batch: Batch) -> bool:
        """Whether the batch can run as it is; if pages are missing, preempt the newest sequence."""
        items = zip(batch.sequences, batch.num_tokens, strict=True)
        needed = sum(self.budget.needed(s.seq_id, n) for s, n in items)
        if self._free_up(needed):
            return True
        assert len(self.running) > 1, "a sequence always fits"
        self._preempt(self.running.pop())
        return False

    def _free_up(self, num_pages: int) -> bool:
        """Evict kept prefixes until so many pages are free; whether that succeeded."""
        while self.budget.num_free < num_pages:
            if not self._release_evicted():
                return False
        return True

    def _release_evicted(self) -> bool:
        evicted = self._prefixes.evict()
        if evicted is None:
            return False
        self._release(evicted)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence.seq_id)
        sequence.phase, sequence.num_computed = Phase.WAITING, 0
        self.waiting.put_back(sequence)
        self._observer.on_preemption()

    def abandon(self) -> None:
        """Forget all sequences and leave the runner as it is."""
        self.waiting = WaitingQueue()
        self.running.clear()
        self.budget = KVBudget(self.budget.num_pages, self.budget.page_size)
