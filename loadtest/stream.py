"""Read one completion's stream into a Measurement, or say what is wrong with it.

Knows OpenAI's stream of events; knows nothing of HTTP or Locust.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from loadtest.errors import HostError, error_message
from loadtest.measurement import Measurement
from loadtest.sse import Event, read_events
from loadtest.workload import Workload


class CompletionStream:
    """One stream as it comes in: when tokens arrived, the usage, whether it was finished."""

    def __init__(self, workload: Workload, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` in seconds. The request's time starts here: build this just before sending."""
        self._workload = workload
        self._clock = clock
        self._num_bytes = 0
        self._token_times: list[float] = []  # one an event, which may carry several tokens
        self._finish_at: float | None = None
        self._done_at: float | None = None
        self._usage: dict[str, Any] | None = None
        self._started_at = clock()

    def read(self, lines: Iterable[bytes]) -> Measurement:
        """Read to the end; raises HostError for an error event or anything missing or short."""
        for event in read_events(self._counted(lines), self._clock):
            if self._done_at is not None:
                continue  # read on to the end: only then can the connection be used again
            if event.data == "[DONE]":
                self._done_at = event.arrived_at
            else:
                self._take(event)
        return self._measurement()

    def _counted(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        for line in lines:
            self._num_bytes += len(line)
            yield line

    def _take(self, event: Event) -> None:
        chunk = _chunk(event)
        for choice in _list_of_objects(chunk, "choices"):
            # An empty text is no token: some hosts open with one before the prefill is done.
            if choice.get("text") or choice.get("token_ids"):
                self._token_times.append(event.arrived_at)
            if choice.get("finish_reason"):
                self._finish_at = event.arrived_at
        self._usage = _object(chunk, "usage") or self._usage

    def _measurement(self) -> Measurement:
        if self._done_at is None:
            raise HostError("the stream ended without [DONE]")
        if self._usage is None:
            raise HostError("the stream has no usage, though include_usage was set")
        num_prompt, num_cached, num_generated = self._checked_counts(self._usage)
        first_token_at, last_token_at = self._checked_times(num_generated)
        return Measurement(
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
            num_generated_tokens=num_generated,
            started_at=self._started_at,
            first_token_at=first_token_at,
            last_token_at=last_token_at,
            done_at=self._done_at,
            num_bytes=self._num_bytes,
        )

    def _checked_counts(self, usage: dict[str, Any]) -> tuple[int, int, int]:
        """Prompt, cached and generated tokens, after they were compared with the workload."""
        num_prompt = _count(usage, "prompt_tokens")
        num_generated = _count(usage, "completion_tokens")
        details = _object(usage, "prompt_tokens_details")
        num_cached = _count(details, "cached_tokens") if details.get("cached_tokens") else 0
        if num_generated != self._workload.num_decode_tokens:
            asked = self._workload.num_decode_tokens
            raise HostError(f"asked for {asked} tokens, the host generated {num_generated}")
        if num_prompt < self._workload.num_prompt_tokens:
            sent = self._workload.num_prompt_tokens
            raise HostError(f"sent {sent} prompt tokens, the host's usage says {num_prompt}")
        if num_cached > num_prompt:
            raise HostError(f"usage says {num_cached} cached of {num_prompt} prompt tokens")
        return num_prompt, num_cached, num_generated

    def _checked_times(self, num_generated: int) -> tuple[float, float]:
        """When the first and the last token arrived.

        The event with the finish_reason counts as the last token's: text that ends within a
        character or that was held back comes with it.
        """
        ends = [*self._token_times, *([] if self._finish_at is None else [self._finish_at])]
        if not ends:
            raise HostError("no event of the stream carries a token")
        first, last = min(ends), max(ends)
        if num_generated > 1 and first == last:
            raise HostError(f"all {num_generated} tokens came in one event: the host streams none")
        return first, last


def _chunk(event: Event) -> dict[str, Any]:
    """The event's JSON object; raises HostError for an error event and for any other text."""
    try:
        chunk = json.loads(event.data)
    except ValueError:
        chunk = None
    if event.name == "error" or (isinstance(chunk, dict) and chunk.get("error")):
        raise HostError(f"error within the stream: {error_message(event.data)}")
    if not isinstance(chunk, dict):
        raise HostError(f"an event of the stream is no JSON object: {event.data[:100]!r}")
    return chunk


def _list_of_objects(parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """`parent[key]`, empty if absent or null; raises HostError for anything but objects."""
    value = parent.get(key) or []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise HostError(f"{key} is no list of objects: {str(value)[:100]}")
    return value


def _object(parent: dict[str, Any], key: str) -> dict[str, Any]:
    """`parent[key]`, empty if absent or null; raises HostError for anything but an object."""
    value = parent.get(key) or {}
    if not isinstance(value, dict):
        raise HostError(f"{key} is no object: {str(value)[:100]}")
    return value


def _count(usage: dict[str, Any], key: str) -> int:
    value = usage.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise HostError(f"usage.{key} is {value!r}: expected a number of tokens")
    return value
