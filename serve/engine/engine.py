"""The engine thread: takes submissions in, runs batches, sends events out.

Knows no TVM, text or HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

from serve.engine.admission import Admission
from serve.engine.batcher import Batch, Batcher, BatcherConfig
from serve.engine.runner import Chunk, Logits, ModelRunner, RunnerLimits
from serve.engine.sampler import sample
from serve.engine.sequence import (
    EarlyEnd,
    FinishEvent,
    FinishReason,
    Phase,
    SamplingParams,
    Sequence,
    TokenEvent,
)
from serve.engine.stats import EngineObserver, Gauges, NullObserver, PhaseName, StepStats
from serve.engine.stream import Outbox, Stream, StreamOutbox
from serve.errors import EngineError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """How the engine batches.

    max_running: sequences computed side by side. max_waiting, max_waiting_tokens: sequences that
    may queue, and prompt tokens of theirs; more are refused. prefill_chunk_tokens: prompt tokens of
    one step, so the longest wait of a running stream. prefix_sharing: reuse the KV pages of a
    common prompt head. max_kept_prefixes: finished sequences kept for that; their pages are given
    up whenever they are needed.
    """

    max_running: int = 32
    max_waiting: int = 1024
    max_waiting_tokens: int = 262_144
    prefill_chunk_tokens: int = 256
    prefix_sharing: bool = True
    max_kept_prefixes: int = field(default=32, metadata={"at_least": 0})


@dataclass(frozen=True)
class _Submission:
    sequence: Sequence
    address: Any


@dataclass(frozen=True)
class _Ending:
    sequence: Sequence
    reason: EarlyEnd
    num_generated: int | None  # what the client takes; None: all


class _Shutdown:
    """The engine thread is to end."""


class Engine:
    """Continuous batching on one runner, which the engine's own thread alone calls.

    Every submitted sequence ends in exactly one FinishEvent, whatever happens.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig | None = None,
        observer: EngineObserver | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        config = config or EngineConfig()
        self._runner, self._config = runner, config
        self._observer: EngineObserver = observer or NullObserver()
        batching = BatcherConfig(
            config.max_running,
            config.prefill_chunk_tokens,
            config.prefix_sharing,
            config.max_kept_prefixes,
        )
        self._batcher = Batcher(runner, batching, self._observer)
        self._inbox: queue.SimpleQueue[_Submission | _Ending | _Shutdown] = queue.SimpleQueue()
        self._live: dict[Sequence, Any] = {}  # the engine thread's; with their addresses
        self._outbox: Outbox = outbox or StreamOutbox()
        self._ids = itertools.count()
        self._num_entered_tokens = 0
        self._gauges = self._measure()
        self._admission = Admission(
            runner.limits,
            config.max_waiting + self._batcher.max_running,
            config.max_waiting_tokens,
            lambda: self._gauges,
        )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called from any thread

    def start(self) -> None:
        self._thread.start()

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._admission.error is None

    @property
    def is_accepting(self) -> bool:
        return self._admission.is_open and self.is_alive

    def gauges(self) -> Gauges:
        """The state after the last step.

        Submissions that the engine has not seen yet count as waiting.
        """
        gauges, admission = self._gauges, self._admission
        return replace(
            gauges,
            num_waiting=max(0, admission.num_unfinished - gauges.num_running),
            num_waiting_tokens=admission.num_waiting_tokens,
        )

    def submit(
        self, prompt_ids: Seq[int], params: SamplingParams, share_key: str | None = ""
    ) -> Stream:
        """Queue a sequence. Call it in a running asyncio loop.

        `share_key`: KV pages are shared among sequences with equal keys only; None never shares.
        Raises RequestError (empty prompt, a token id outside the vocabulary, also in logit_bias),
        ContextLengthError, OverloadedError (the queue is full), EngineError (draining or dead).
        """
        loop = asyncio.get_running_loop()
        # The sequence exists only once the stream does, which has to end it.
        sequences: list[Sequence] = []
        stream = Stream(loop, lambda reason, count: self.end(sequences[0], reason, count))
        sequences.append(self.enqueue(prompt_ids, params, share_key, stream))
        return stream

    def enqueue(
        self, prompt_ids: Seq[int], params: SamplingParams, share_key: str | None, address: Any
    ) -> Sequence:
        """As `submit`, with the events going to `address`, as the outbox understands it."""
        self._admission.check(prompt_ids, params)
        sequence = Sequence(next(self._ids), tuple(prompt_ids), params, share_key)
        with self._admission.lock:
            self._admission.enter(len(prompt_ids))
            self._inbox.put(_Submission(sequence, address))
        return sequence

    def end(self, sequence: Sequence, reason: EarlyEnd, num_generated: int | None = None) -> None:
        """End it within one step, if it has not ended; safe from any thread."""
        self._inbox.put(_Ending(sequence, reason, num_generated))

    async def drain(self, seconds: float) -> None:
        """Take no more sequences, give the unfinished so long, cancel the rest, stop."""
        self._admission.close()
        deadline = time.monotonic() + seconds
        while self._admission.num_unfinished and self.is_alive and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._inbox.put(_Shutdown())
        if self._thread.ident is None:  # never started: somebody may have submitted all the same
            self._thread.start()
        await asyncio.to_thread(self._thread.join)

    # -- in the engine thread

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
                self._publish()
            self._cancel_all()
        except BaseException as error:
            log.exception("the engine has failed")
            self._admission.fail(error)
            self._abandon_all()
        finally:
            self._publish()

    def _take_inbox(self) -> bool:
        """Handle what has come in, waiting for it if there is nothing to do. False: stop."""
        while True:
            try:
                item = self._inbox.get(block=not self._live)
            except queue.Empty:
                return True
            if isinstance(item, _Shutdown):
                return False
            self._handle(item)
            if not self._live:
                self._publish()  # before it waits

    def _handle(self, item: _Submission | _Ending) -> None:
        if isinstance(item, _Submission):
            self._live[item.sequence] = item.address
            self._num_entered_tokens += item.sequence.num_prompt_tokens
            self._batcher.submit(item.sequence)
        elif item.sequence in self._live:
            self._finish(item.sequence, item.reason, num_generated=item.num_generated)

    def _step(self) -> None:
        batch = self._batcher.next_batch(time.perf_counter())
        if batch is None:
            return
        start = time.perf_counter()
        try:
            logits = self._call(batch)
        except Exception:
            log.exception("a %s step of %d sequences failed", batch.phase, len(batch.sequences))
            self._fail(batch.sequences)
            return
        seconds = time.perf_counter() - start
        shares = _stats(batch, seconds)
        self._batcher.computed(batch)
        for stats in shares:
            self._admission.on_step(stats)
            self._observer.on_step(stats)
        self._extend(batch.sequences, logits)

    def _call(self, batch: Batch) -> Logits:
        if batch.phase == "decode":
            newest = [s.token_ids[-1] for s in batch.sequences]
            return self._runner.decode([s.seq_id for s in batch.sequences], newest)
        chunks = [
            Chunk(s.seq_id, s.token_ids[s.num_computed : s.num_computed + n])
            for s, n in zip(batch.sequences, batch.num_tokens, strict=True)
        ]
        return self._runner.prefill(chunks)

    def _extend(self, sequences: Seq[Sequence], logits: Logits) -> None:
        """Give each sequence that has no token left to compute its next one."""
        rows = [i for i, s in enumerate(sequences) if not s.num_pending]
        complete = [sequences[i] for i in rows]
        if len(rows) < len(sequences):
            logits = logits[rows]  # a copy
        tokens = sample(logits, complete)
        now = time.perf_counter()
        for sequence, token_id in zip(complete, tokens, strict=True):
            if token_id is None:
                log.error("sequence %d: no token can be chosen from its logits", sequence.seq_id)
                self._fail([sequence])
            else:
                self._append(sequence, token_id, now)

    def _append(self, sequence: Sequence, token_id: int, now: float) -> None:
        sequence.append(token_id)
        if sequence.first_token is None:
            sequence.first_token = now
            self._observer.on_first_token(now - sequence.arrived)
        self._outbox.put(self._live[sequence], TokenEvent(token_id, sequence.newest_is_stop()))
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason)

    def _fail(self, sequences: Seq[Sequence]) -> None:
        cause = EngineError("The step that computed this sequence failed")
        for sequence in sequences:
            self._finish(sequence, "error", cause)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: Exception | None = None,
        num_generated: int | None = None,
    ) -> None:
        self._batcher.finish(sequence, reusable=error is None)
        self._announce(sequence, reason, error, num_generated)

    def _announce(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: Exception | None,
        num_generated: int | None = None,
    ) -> None:
        event = FinishEvent(
            reason,
            sequence.num_prompt_tokens,
            sequence.num_generated if num_generated is None else num_generated,
            sequence.num_cached,
            sequence.timings(time.perf_counter()),
            error,
        )
        self._outbox.put(self._live.pop(sequence), event)
        self._admission.leave()
        self._observer.on_finish(event)

    def _cancel_all(self) -> None:
        """Drained: every submission came in before the shutdown."""
        for sequence in list(self._live):
            self._finish(sequence, "cancelled")

    def _abandon_all(self) -> None:
        """Whatever state runner and batcher are in: tell everybody, the unread submissions too."""
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, _Submission):
                self._live[item.sequence] = item.address
                self._num_entered_tokens += item.sequence.num_prompt_tokens
        self._batcher.abandon()
        error = EngineError("The engine has failed")
        for sequence in list(self._live):
            try:
                self._announce(sequence, "error", error)
            except Exception:
                log.exception("the observer has failed")

    def _publish(self) -> None:
        self._gauges = self._measure()
        self._outbox.flush()

    def _measure(self) -> Gauges:
        waiting, budget = self._batcher.waiting, self._batcher.budget
        return Gauges(
            num_running=len(self._batcher.running),
            num_waiting=len(waiting),
            num_waiting_tokens=sum(s.num_pending for s in waiting),
            num_pages_used=budget.num_used,
            num_pages_total=budget.num_pages,
            num_waiting_completion_tokens=sum(
                s.max_length - s.num_generated - s.num_prompt_tokens for s in waiting
            ),
            num_entered_tokens=self._num_entered_tokens,
        )


def _stats(batch: Batch, seconds: float) -> list[StepStats]:
    """Of each phase that is in the batch: of a step that does both, its share by tokens."""
    shares = []
    total = sum(batch.num_tokens)
    phases: tuple[tuple[PhaseName, bool], ...] = (("prefill", False), ("decode", True))
    for phase, decodes in phases:
        items = zip(batch.sequences, batch.num_tokens, strict=True)
        counts = [n for s, n in items if (s.phase is Phase.DECODE) == decodes]
        if counts:
            share = seconds * sum(counts) / total
            shares.append(StepStats(phase, share, sum(counts), len(counts)))
    return shares
