"""Server-sent events out of lines, with the time each arrived. Knows nothing of completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One event: its `event:` name, its `data:` lines joined, and when its data was there."""

    name: str  # "message" unless the host named it
    data: str
    arrived_at: float  # seconds, on the clock that read_events was given


def read_events(lines: Iterable[bytes], clock: Callable[[], float]) -> Iterator[Event]:
    """Yield each event as its blank line arrives; one that the end cuts off is dropped.

    Source: the WHATWG HTML standard, "Interpreting an event stream" (comments, `id:` and `retry:`
    are skipped).
    """
    name, data, arrived_at = "message", list[str](), 0.0
    for line in lines:
        now = clock()
        field, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
            arrived_at = now
        elif field == "event":
            name = value
        elif not line.strip():
            if data:
                yield Event(name, "\n".join(data), arrived_at)
            name, data = "message", []
