"""The engine thread: takes submissions in, runs batches, sends events out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from serve.engine.runner import ModelRunner
from serve.engine.sequence import Event, SamplingParams
from serve.engine.stats import EngineObserver, Gauges


@dataclass(frozen=True)
class EngineConfig:
    """max_waiting: sequences that may queue; one more is refused (OverloadedError)."""

    max_running: int = 32
    max_waiting: int = 1024
    prefill_chunk_tokens: int = 256
    prefix_sharing: bool = True
    drain_seconds: float = 30.0


class Stream:
    """The events of one sequence, in order, for the asyncio loop that submitted it; FinishEvent is the last."""

    def __aiter__(self) -> AsyncIterator[Event]: ...
    def cancel(self) -> None:
        """End the sequence within one step; safe from any thread, and after the end."""


class Engine:
    def __init__(
        self, runner: ModelRunner, config: EngineConfig, observer: EngineObserver
    ) -> None: ...
    def start(self) -> None: ...
    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, share_key: str | None = ""
    ) -> Stream:
        """Queue a sequence. Call it in a running asyncio loop.

        Raises RequestError (empty prompt, token id outside the vocabulary), ContextLengthError,
        OverloadedError (the queue is full), EngineError (draining or dead).
        """

    def gauges(self) -> Gauges: ...
    @property
    def is_alive(self) -> bool: ...
    async def drain(self, seconds: float) -> None:
        """Take no more sequences; wait for the running ones at most so long, then end them; stop the thread."""
