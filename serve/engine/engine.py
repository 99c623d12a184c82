"""The engine thread: takes submissions in, runs batches, sends events out.

Knows no TVM, text or HTTP.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from serve.engine.admission import Admission
from serve.engine.batcher import Batch, Batcher, BatcherConfig
from serve.engine.constraint import Constrain, Constraint
from serve.engine.generate import generate, read_prompt
from serve.engine.runner import Chunk, Logits, ModelRunner, RunnerLimits
from serve.engine.sequence import (
    EarlyEnd,
    FinishEvent,
    FinishReason,
    Phase,
    PromptEvent,
    SamplingParams,
    Sequence,
    TokenEvent,
    TokenLogprobs,
)
from serve.engine.stats import EngineObserver, Gauges, NullObserver, PhaseName, StepStats
from serve.engine.stream import Outbox, Stream, StreamOutbox
from serve.errors import EngineError, RequestError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """How the engine batches.

    max_running: sequences computed side by side. max_waiting, max_waiting_tokens: sequences that
    may queue, and prompt tokens of theirs; more are refused. prefill_chunk_tokens: prompt tokens of
    one step, so the longest wait of a running stream. prefix_sharing: reuse the KV pages of a
    common prompt head. max_kept_prefixes: finished sequences kept for that; their pages are given
    up whenever they are needed. speculative_tokens: guessed of each sequence in a decode step, at
    most; 0 guesses nothing. They change no answer.
    """

    max_running: int = 32
    max_waiting: int = 2048
    max_waiting_tokens: int = 1_048_576
    prefill_chunk_tokens: int = 256
    prefix_sharing: bool = True
    max_kept_prefixes: int = field(default=32, metadata={"at_least": 0})
    speculative_tokens: int = field(default=0, metadata={"at_least": 0})


@dataclass(frozen=True)
class _Submission:
    sequence: Sequence
    address: Any


@dataclass(frozen=True)
class _Ending:
    address: Any
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
        constrain: Constrain | None = None,
    ) -> None:
        """`constrain`: makes the constraint of a request with a grammar; None refuses those."""
        config = config or EngineConfig()
        self._runner, self._config = runner, config
        self._observer: EngineObserver = observer or NullObserver()
        batching = BatcherConfig(
            config.max_running,
            config.prefill_chunk_tokens,
            config.prefix_sharing,
            config.max_kept_prefixes,
            config.speculative_tokens,
        )
        self._batcher = Batcher(runner, batching, self._observer)
        self._inbox: queue.SimpleQueue[_Submission | _Ending | _Shutdown] = queue.SimpleQueue()
        self._live: dict[Sequence, Any] = {}  # the engine thread's; with their addresses
        self._by_address: dict[Any, Sequence] = {}
        self._outbox: Outbox = outbox or StreamOutbox()
        self._constrain: Constrain = constrain or _refuse
        self._step_began: float | None = None
        self._ids = itertools.count()
        self._num_entered_tokens = self._num_entered_completion_tokens = 0
        self._deadline = math.inf  # of a drain; under the admission's lock
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

    @property
    def busy_seconds(self) -> float:
        """How long the step has taken that runs at this moment; 0 if none does."""
        began = self._step_began
        return 0.0 if began is None else time.perf_counter() - began

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
        Raises RequestError (empty prompt, a token id outside the vocabulary, also in logit_bias, a
        grammar that cannot be used), ContextLengthError, OverloadedError (the queue is full),
        EngineError (draining or dead).
        """
        stream = Stream(asyncio.get_running_loop(), self.end)
        self.enqueue(prompt_ids, params, share_key, stream)
        return stream

    def enqueue(
        self, prompt_ids: Seq[int], params: SamplingParams, share_key: str | None, address: Any
    ) -> None:
        """As `submit`, with the events going to `address`, as the outbox understands it."""
        self._admission.check(prompt_ids, params)
        constraint = None if params.grammar is None else self._constrain(params.grammar)
        sequence = Sequence(next(self._ids), tuple(prompt_ids), params, share_key, constraint)
        with self._admission.lock:
            self._admission.enter(len(prompt_ids), params.max_tokens)
            self._inbox.put(_Submission(sequence, address))

    def check_room(self, num_sequences: int, num_prompt_tokens: int) -> None:
        """Whether so many may be submitted now, with so many prompt tokens in all.

        Raises OverloadedError, RequestError if they never could be, EngineError (draining or dead).
        """
        self._admission.check_room(num_sequences, num_prompt_tokens)

    def end(self, address: Any, reason: EarlyEnd, num_generated: int | None = None) -> None:
        """End its sequence within one step, if it has not ended; safe from any thread."""
        self._inbox.put(_Ending(address, reason, num_generated))

    def hasten(self, seconds: float) -> None:
        """Take no more sequences; a drain gives the unfinished so long at most, from now on."""
        self._admission.close()
        deadline = time.monotonic() + seconds
        with self._admission.lock:
            self._deadline = min(self._deadline, deadline)

    async def drain(self, seconds: float) -> None:
        """Take no more sequences, give the unfinished so long, cancel the rest, stop.

        Of several, the one that is to end first counts.
        """
        self.hasten(seconds)
        while (
            self._admission.num_unfinished and self.is_alive and time.monotonic() < self._deadline
        ):
            await asyncio.sleep(0.01)
        self._inbox.put(_Shutdown())
        if self._thread.ident is None:  # never started: somebody may have submitted all the same
            self._thread.start()
        await asyncio.to_thread(self._thread.join)

    # -- in the engine thread

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step_began = time.perf_counter()
                self._step()
                self._publish()
                self._step_began = None
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
            self._enter(item)
            self._batcher.submit(item.sequence)
        elif item.address in self._by_address:
            sequence = self._by_address[item.address]
            self._finish(sequence, item.reason, num_generated=item.num_generated)

    def _enter(self, submission: _Submission) -> None:
        sequence, address = submission.sequence, submission.address
        self._live[sequence], self._by_address[address] = address, sequence
        self._num_entered_tokens += sequence.num_prompt_tokens
        self._num_entered_completion_tokens += sequence.params.max_tokens

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
        num_accepted = 0
        for sequence, rows in zip(batch.sequences, _rows(batch, logits), strict=True):
            num_accepted += self._extend(sequence, rows, batch.drafts.get(sequence, ()))
        if batch.drafts:
            [decode] = shares
            shares = [replace(decode, num_tokens=decode.num_tokens + num_accepted)]
            num_drafted = sum(len(draft) for draft in batch.drafts.values())
            self._observer.on_speculation(num_drafted, num_accepted)
        for stats in shares:
            self._admission.on_step(stats)
            self._observer.on_step(stats)

    def _call(self, batch: Batch) -> Logits:
        """The logits after each sequence's last token, or after every token if it verifies."""
        if batch.phase == "decode" and not batch.verifies:
            newest = [s.token_ids[-1] for s in batch.sequences]
            return self._runner.decode([s.seq_id for s in batch.sequences], newest)
        chunks = [
            Chunk(
                s.seq_id,
                [*s.token_ids[s.num_computed : s.num_computed + n], *batch.drafts.get(s, ())],
            )
            for s, n in zip(batch.sequences, batch.num_tokens, strict=True)
        ]
        return self._runner.verify(chunks) if batch.verifies else self._runner.prefill(chunks)

    def _extend(self, sequence: Sequence, rows: Logits, draft: Seq[int]) -> int:
        """`rows`: after the last tokens that were computed of the sequence, (tokens, vocab).

        If none is left to compute, it gets its next ones; how many of the draft were among them.
        """
        events: list[TokenEvent] = []
        try:
            if sequence.prompt_logprobs is not None:
                read_prompt(sequence, rows)
            if sequence.phase is Phase.DECODE and sequence.params.max_tokens:
                generate(sequence, rows[-1 - len(draft) :], draft, events)
        except RequestError as error:  # its own grammar's
            self._send(sequence, events)
            self._finish(sequence, "error", error)
            return 0
        except Exception:
            log.exception("sequence %d cannot go on", sequence.seq_id)
            self._send(sequence, events)
            self._fail([sequence])
            return 0
        if sequence.phase is Phase.PREFILL:
            return 0
        num_accepted = len(events) - 1 if draft else 0
        if draft:
            self._batcher.settle(sequence, len(draft), num_accepted)
        if sequence.prompt_logprobs is not None:
            self._send_prompt(sequence, sequence.prompt_logprobs)
        self._send(sequence, events)
        reason = sequence.finish_reason()
        if reason is not None:
            self._finish(sequence, reason)
        return num_accepted

    def _send_prompt(self, sequence: Sequence, logprobs: Seq[TokenLogprobs | None]) -> None:
        self._outbox.put(self._live[sequence], PromptEvent(tuple(logprobs)))
        sequence.prompt_logprobs = None

    def _send(self, sequence: Sequence, events: Seq[TokenEvent]) -> None:
        now = time.perf_counter()
        for event in events:
            if sequence.last_token is None:
                sequence.first_token = now
                self._observer.on_first_token(now - sequence.arrived)
            else:
                self._observer.on_inter_token(now - sequence.last_token)
            sequence.last_token = now
            self._outbox.put(self._live[sequence], event)

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
        address = self._live.pop(sequence)
        self._by_address.pop(address, None)
        self._outbox.put(address, event)
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
                self._enter(item)
        self._batcher.abandon()
        error = EngineError("The engine has failed", "engine_dead")
        for sequence in list(self._live):
            try:
                self._announce(sequence, "error", error)
            except Exception:
                log.exception("the observer has failed")

    def _publish(self) -> None:
        self._gauges = self._measure()
        self._outbox.flush()

    def _measure(self) -> Gauges:
        batcher = self._batcher
        return Gauges(
            num_running=len(batcher.running),
            num_waiting=len(batcher.waiting),
            num_waiting_tokens=batcher.waiting.num_tokens,
            num_pages_used=batcher.budget.num_used,
            num_pages_total=batcher.budget.num_pages,
            num_waiting_completion_tokens=batcher.waiting.num_completion_tokens,
            num_running_completion_tokens=sum(s.num_to_come for s in batcher.running),
            num_entered_tokens=self._num_entered_tokens,
            num_entered_completion_tokens=self._num_entered_completion_tokens,
        )


def _refuse(_: str) -> Constraint:
    raise RequestError("This model is served without structured output", param="grammar")


def _rows(batch: Batch, logits: Logits) -> list[Logits]:
    """Each sequence's logits, (tokens, vocab): after its last token, or after all of its tokens."""
    counts = batch.sizes if batch.verifies else [1] * len(batch.sequences)
    return np.split(logits, np.cumsum(counts[:-1]))


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
