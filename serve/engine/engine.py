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

from serve.engine.batcher import Batch, Batcher, BatcherConfig
from serve.engine.runner import Chunk, Logits, ModelRunner, RunnerLimits
from serve.engine.sampler import sample
from serve.engine.sequence import (
    FinishEvent,
    FinishReason,
    Phase,
    SamplingParams,
    Sequence,
    TokenEvent,
)
from serve.engine.stats import EngineObserver, Gauges, NullObserver, PhaseName, StepStats
from serve.engine.stream import Outbox, Stream
from serve.errors import ContextLengthError, EngineError, OverloadedError, RequestError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """How the engine batches.

    max_running: sequences computed side by side. max_waiting: sequences that may queue; one more is
    refused. prefill_chunk_tokens: prompt tokens of one step, so the longest wait of a running
    stream. prefix_sharing: reuse the KV pages of a common prompt head. max_kept_prefixes: finished
    sequences kept for that; their pages are given up whenever they are needed.
    """

    max_running: int = 32
    max_waiting: int = 1024
    prefill_chunk_tokens: int = 256
    prefix_sharing: bool = True
    max_kept_prefixes: int = field(default=32, metadata={"at_least": 0})


@dataclass(frozen=True)
class _Submission:
    sequence: Sequence
    stream: Stream


@dataclass(frozen=True)
class _Ending:
    sequence: Sequence
    reason: FinishReason
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
        self._live: dict[Sequence, Stream] = {}  # the engine thread's
        self._outbox = Outbox()
        self._ids = itertools.count()
        self._lock = (
            threading.Lock()
        )  # guards the three below: no submission slips past a dying engine
        self._accepting = True
        self._num_unfinished = 0
        self._error: BaseException | None = None
        self._gauges = self._measure()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called from any thread

    def start(self) -> None:
        self._thread.start()

    @property
    def limits(self) -> RunnerLimits:
        return self._runner.limits

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._error is None

    @property
    def is_accepting(self) -> bool:
        return self._accepting and self.is_alive

    def gauges(self) -> Gauges:
        """The state after the last step.

        Submissions that the engine has not seen yet count as waiting.
        """
        gauges = self._gauges
        return replace(gauges, num_waiting=max(0, self._num_unfinished - gauges.num_running))

    def submit(
        self, prompt_ids: Seq[int], params: SamplingParams, share_key: str | None = ""
    ) -> Stream:
        """Queue a sequence. Call it in a running asyncio loop.

        `share_key`: KV pages are shared among sequences with equal keys only; None never shares.
        Raises RequestError (empty prompt, a token id outside the vocabulary, also in logit_bias),
        ContextLengthError, OverloadedError (the queue is full), EngineError (draining or dead).
        """
        self._check(prompt_ids, params)
        loop = asyncio.get_running_loop()
        with self._lock:
            self._check_open()
            sequence = Sequence(next(self._ids), tuple(prompt_ids), params, share_key)

            def end(reason: FinishReason, num_generated: int | None) -> None:
                self._inbox.put(_Ending(sequence, reason, num_generated))

            stream = Stream(loop, end)
            self._num_unfinished += 1
            self._inbox.put(_Submission(sequence, stream))
        return stream

    async def drain(self, seconds: float) -> None:
        """Take no more sequences, give the unfinished so long, cancel the rest, stop."""
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + seconds
        while self._num_unfinished and self.is_alive and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._inbox.put(_Shutdown())
        if self._thread.ident is None:  # never started: somebody may have submitted all the same
            self._thread.start()
        await asyncio.to_thread(self._thread.join)

    def _check(self, prompt_ids: Seq[int], params: SamplingParams) -> None:
        limits = self._runner.limits
        if not prompt_ids:
            raise RequestError("The prompt is empty: give at least one token", param="prompt")
        for param, token_ids in (("prompt", prompt_ids), ("logit_bias", params.logit_bias)):
            for token_id in token_ids:
                if not 0 <= token_id < limits.vocab_size:
                    raise RequestError(
                        f"Token id {token_id} is outside the vocabulary "
                        f"(0 to {limits.vocab_size - 1})",
                        param,
                    )
        if params.max_tokens < 1:
            raise RequestError(f"max_tokens is {params.max_tokens}; at least 1", param="max_tokens")
        if len(prompt_ids) + params.max_tokens > limits.max_context:
            raise ContextLengthError(len(prompt_ids), params.max_tokens, limits.max_context)

    def _check_open(self) -> None:
        if self._error is not None:
            raise EngineError("The engine has failed and takes no more requests")
        if not self._accepting:
            raise EngineError("The server is shutting down and takes no more requests")
        if self._num_unfinished >= self._config.max_waiting + self._batcher.max_running:
            raise OverloadedError(
                f"{self._num_unfinished} sequences are queued or running; try again later", 1.0
            )

    # -- in the engine thread

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
                self._publish()
            self._cancel_all()
        except BaseException as error:
            log.exception("the engine has failed")
            with self._lock:
                self._error = error
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
            self._live[item.sequence] = item.stream
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
        with self._lock:
            self._num_unfinished -= 1
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
                self._live[item.sequence] = item.stream
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
