"""What the engine tells about itself.

An observer protocol, and throughput over the last seconds of busy time.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from serve.engine.sequence import FinishEvent

PhaseName = Literal["prefill", "decode"]


@dataclass(frozen=True)
class StepStats:
    """One model call, or one phase's share of it, if it did both.

    `num_tokens` went into the KV cache and stayed: in decode, one for each sequence, and its right
    guesses.
    """

    phase: PhaseName
    seconds: float
    num_tokens: int
    num_sequences: int


@dataclass(frozen=True)
class Gauges:
    """The engine's state after a step.

    num_waiting_completion_tokens, num_running_completion_tokens: what those may yet generate, at
    most. num_entered_tokens: of all the prompts that the engine has ever seen;
    num_entered_completion_tokens: what could be generated from them, at most.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_pages_used: int = 0
    num_pages_total: int = 0
    num_waiting_completion_tokens: int = 0
    num_running_completion_tokens: int = 0
    num_entered_tokens: int = field(default=0, compare=False)
    num_entered_completion_tokens: int = field(default=0, compare=False)


class EngineObserver(Protocol):
    """Called in the engine thread; must be quick and must not raise."""

    def on_step(self, stats: StepStats) -> None: ...
    def on_first_token(self, seconds: float) -> None: ...
    def on_inter_token(self, seconds: float) -> None: ...
    def on_prefix_lookup(self, num_queried: int, num_hit: int) -> None: ...
    def on_preemption(self) -> None: ...
    def on_speculation(self, num_drafted: int, num_accepted: int) -> None: ...
    def on_finish(self, event: FinishEvent) -> None: ...


class NullObserver:
    """For engines nobody watches."""

    def on_step(self, stats: StepStats) -> None:
        """Not recorded."""

    def on_first_token(self, seconds: float) -> None:
        """Not recorded."""

    def on_inter_token(self, seconds: float) -> None:
        """Not recorded."""

    def on_prefix_lookup(self, num_queried: int, num_hit: int) -> None:
        """Not recorded."""

    def on_preemption(self) -> None:
        """Not recorded."""

    def on_speculation(self, num_drafted: int, num_accepted: int) -> None:
        """Not recorded."""

    def on_finish(self, event: FinishEvent) -> None:
        """Not recorded."""


class ThroughputWindow:
    """Tokens per second over the last `window_seconds` of busy time.

    Idle time does not dilute it.
    """

    def __init__(self, window_seconds: float = 10.0) -> None:
        self._window = window_seconds
        self._steps: deque[tuple[int, float]] = deque()
        self._tokens, self._seconds = 0, 0.0
        self._lock = threading.Lock()

    def add(self, num_tokens: int, seconds: float) -> None:
        with self._lock:
            self._steps.append((num_tokens, seconds))
            self._tokens += num_tokens
            self._seconds += seconds
            while self._seconds - self._steps[0][1] >= self._window:
                old_tokens, old_seconds = self._steps.popleft()
                self._tokens -= old_tokens
                self._seconds -= old_seconds

    def tokens_per_second(self) -> float:
        """0 before the first step."""
        with self._lock:
            return self._tokens / self._seconds if self._seconds > 0 else 0.0
