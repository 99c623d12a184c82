"""A ModelRunner without a model: the next token is a pure function of the tokens so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from serve.engine import Chunk, Logits, RunnerLimits

NextToken = Callable[[Sequence[int]], int]

LIMITS = RunnerLimits(
    vocab_size=50257,
    max_context=256,
    max_batch=8,
    max_step_tokens=64,
    page_size=4,
    num_pages=512,
)


def hashed(vocab_size: int = 50257) -> NextToken:
    """A next token that looks random and depends on every token before it."""

    def next_token(ids: Sequence[int]) -> int:
        value = 0
        for token_id in ids:
            value = (value * 1_000_003 + token_id + 1) % 2_147_483_647
        return value % vocab_size

    return next_token


def scripted(eos_token_id: int, *lines: Sequence[int]) -> NextToken:
    """Continues a prompt that is the beginning of a line to the line's end, then ends the text."""

    def next_token(ids: Sequence[int]) -> int:
        for line in lines:
            if len(ids) < len(line) and list(line[: len(ids)]) == list(ids):
                return line[len(ids)]
        return eos_token_id

    return next_token


class Paced:
    """The tokens of one line, each handed out only after a step() of the test's."""

    def __init__(self, line: Sequence[int]) -> None:
        self._line, self._permits = line, threading.Semaphore(0)

    def __call__(self, ids: Sequence[int]) -> int:
        assert self._permits.acquire(timeout=60), "nobody called step()"
        return self._line[len(ids)]

    def step(self, num_tokens: int = 1) -> None:
        self._permits.release(num_tokens)


class FakeRunner:
    """Implements ModelRunner and holds it to its contract: a wrong call is an AssertionError.

    The logits are `peak` at the next token, else 0; peak 0 makes all equally likely.
    gate: every step waits while it is cleared; at_gate: set by a step that waits. step_seconds: how
    long every step takes. failure: raised by the next step, once. calls: the steps that were done,
    each with its number of sequences. tokens: what the KV cache holds of each sequence.
    """

    def __init__(
        self,
        limits: RunnerLimits = LIMITS,
        next_token: NextToken | None = None,
        peak: float = 100.0,
    ) -> None:
        self._limits = limits
        self._next_token = next_token or hashed(limits.vocab_size)
        self._peak = peak
        self.gate, self.at_gate = threading.Event(), threading.Event()
        self.gate.set()
        self.step_seconds = 0.0
        self.failure: BaseException | None = None
        self.calls: list[tuple[str, int]] = []
        self.tokens: dict[int, list[int]] = {}
        self._pages: dict[int, list[int]] = {}
        self._broken: set[int] = set()  # were in a step that failed: fit to be released only
        self._thread: int | None = None
        self._holders = [0] * limits.num_pages

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def add(self, seq_id: int) -> None:
        self._check_thread()
        assert seq_id not in self.tokens, f"sequence {seq_id} exists"
        self.tokens[seq_id], self._pages[seq_id] = [], []

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        assert parent_id not in self._broken
        parent = self.tokens[parent_id]
        assert 0 < num_tokens <= len(parent)
        self.add(child_id)
        for page in self._pages[parent_id][: num_tokens // self._limits.page_size]:
            self._hold(child_id, page)
        self._append(child_id, parent[:num_tokens])

    def prefill(self, chunks: Sequence[Chunk]) -> Logits:
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self._limits.max_step_tokens
        self._step("prefill", [chunk.seq_id for chunk in chunks])
        for chunk in chunks:
            assert chunk.token_ids
            self._append(chunk.seq_id, chunk.token_ids)
        return self._logits([self.tokens[chunk.seq_id] for chunk in chunks])

    def decode(self, seq_ids: Sequence[int], token_ids: Sequence[int]) -> Logits:
        self._step("decode", seq_ids)
        for seq_id, token_id in zip(seq_ids, token_ids, strict=True):
            assert self.tokens[seq_id], "decode before prefill"
            self._append(seq_id, [token_id])
        return self._logits([self.tokens[seq_id] for seq_id in seq_ids])

    def verify(self, chunks: Sequence[Chunk]) -> Logits:
        self._step("verify", [chunk.seq_id for chunk in chunks])
        heads = []
        for chunk in chunks:
            for token_id in chunk.token_ids:
                self._append(chunk.seq_id, [token_id])
                heads.append(list(self.tokens[chunk.seq_id]))
        return self._logits(heads)

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        tokens, pages = self.tokens[seq_id], self._pages[seq_id]
        assert 0 <= num_tokens <= len(tokens)
        del tokens[len(tokens) - num_tokens :]
        while len(pages) > self._pages_for(len(tokens)):
            self._holders[pages.pop()] -= 1

    def release(self, seq_id: int) -> None:
        self._check_thread()
        del self.tokens[seq_id]
        self._broken.discard(seq_id)
        for page in self._pages.pop(seq_id):
            self._holders[page] -= 1

    def num_free_pages(self) -> int:
        return self._holders.count(0)

    def _step(self, what: str, seq_ids: Sequence[int]) -> None:
        self._check_thread()
        assert seq_ids, "an empty step"
        assert self._broken.isdisjoint(seq_ids)
        assert len(set(seq_ids)) == len(seq_ids) <= self._limits.max_batch
        self._wait()
        self.calls.append((what, len(seq_ids)))
        if self.failure is not None:
            failure, self.failure = self.failure, None
            self._broken.update(seq_ids)
            raise failure

    def _check_thread(self) -> None:
        current = threading.get_ident()
        self._thread = self._thread or current
        assert current == self._thread, "two threads call the runner"

    def _wait(self) -> None:
        if not self.gate.is_set():
            self.at_gate.set()
            assert self.gate.wait(60), "nobody opened the gate"
            self.at_gate.clear()
        if self.step_seconds:
            time.sleep(self.step_seconds)

    def _append(self, seq_id: int, token_ids: Sequence[int]) -> None:
        tokens = self.tokens[seq_id]
        tokens.extend(token_ids)
        assert len(tokens) <= self._limits.max_context
        while len(self._pages[seq_id]) < self._pages_for(len(tokens)):
            assert 0 in self._holders, "out of KV pages"
            self._hold(seq_id, self._holders.index(0))

    def _hold(self, seq_id: int, page: int) -> None:
        self._pages[seq_id].append(page)
        self._holders[page] += 1

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.page_size)

    def _logits(self, heads: Sequence[Sequence[int]]) -> Logits:
        logits = np.zeros((len(heads), self._limits.vocab_size), np.float32)
        for row, ids in enumerate(heads):
            logits[row, self._next_token(ids)] = self._peak
        return logits
