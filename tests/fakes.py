"""A ModelRunner without a model: the next token is a pure function of the tokens so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from serve.api.admin import LibraryState, ReloadReport
from serve.engine import Chunk, Logits, Row, RunnerLimits
from serve.errors import ConflictError, RequestError

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


def looping(vocab_size: int) -> NextToken:
    """A next token that, four times out of five, depends on the newest one only: it goes round."""
    everything = hashed(vocab_size)

    def next_token(ids: Sequence[int]) -> int:
        return everything(ids if ids[-1] % 5 == 0 else ids[-1:])

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


class FakeConstraint:
    """The tokens before the end are, modulo `text`'s first number, 0, 1, 2, and so on.

    `text`: that number, how many tokens there are at least and at most, and the end-of-text token,
    such as "3 2 7 0". A wrong call is an AssertionError.
    """

    def __init__(self, text: str) -> None:
        self._modulus, self._at_least, self._at_most, self._eos = map(int, text.split())
        self._count = 0
        self.is_over = False

    def mask(self, row: Row) -> None:
        assert not self.is_over
        ids = np.arange(len(row))
        is_allowed = (ids % self._modulus == self._count % self._modulus) & (ids != self._eos)
        is_allowed &= self._count < self._at_most
        is_allowed[self._eos] = self._count >= self._at_least
        row[~is_allowed] = -np.inf

    def accept(self, token_id: int) -> None:
        assert self.allowed([token_id]) == 1
        self.is_over = token_id == self._eos
        self._count += 1

    def allowed(self, token_ids: Sequence[int]) -> int:
        if self.is_over:
            return 0
        for n, token_id in enumerate(token_ids):
            at = self._count + n
            if token_id == self._eos:
                return n + (at >= self._at_least)
            if at >= self._at_most or token_id % self._modulus != at % self._modulus:
                return n
        return len(token_ids)


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
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self._limits.max_step_tokens
        self._step("verify", [chunk.seq_id for chunk in chunks])
        heads = []
        for chunk in chunks:
            assert chunk.token_ids
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
        if len(tokens) % self._limits.page_size and self._holders[pages[-1]] > 1:
            self._holders[pages.pop()] -= 1
            assert 0 in self._holders, "out of KV pages"
            self._hold(seq_id, self._holders.index(0))

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


class FakeAdmin:
    """An Admin over names alone: profiles that exist, and those that are "loaded"."""

    def __init__(self) -> None:
        self._known, self._loaded, self._default = ("baseline", "full"), {"full"}, "full"

    async def load(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        self._check(profile, backend)
        self._loaded.add(profile)
        return self._state(profile, None if wait else "queued")

    async def unload(self, profile: str, backend: str | None, wait: bool) -> LibraryState:  # noqa: ARG002
        self._check(profile, backend)
        if profile == self._default:
            raise ConflictError(f"{profile} is the default")
        if profile not in self._loaded:
            raise RequestError(f"{profile} is not loaded", "profile")
        self._loaded.remove(profile)
        return self._state(profile, None)

    async def make_default(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        state = await self.load(profile, backend, wait)
        self._default = profile
        return state

    async def reload(self) -> ReloadReport:
        return ReloadReport(changed=[], libraries=self.states())

    def states(self) -> list[LibraryState]:
        return [self._state(profile, None) for profile in sorted(self._loaded)]

    def profiles(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "description": "",
                "rules": {},
                "libraries": [self._state(n, None).model_dump() for n in self._loaded if n == name],
            }
            for name in self._known
        ]

    def _check(self, profile: str, backend: str | None) -> None:
        if profile not in self._known or backend not in (None, "cpu"):
            raise RequestError(f"no profile {profile!r} for {backend!r}", "profile")

    def _state(self, profile: str, phase: str | None) -> LibraryState:
        return LibraryState(
            profile=profile,
            backend="cpu",
            name=f"gettysburg@cpu:{profile}",
            state="loaded" if phase is None else "loading",
            phase=phase,
            is_default=profile == self._default,
        )
