"""The way from the engine thread to an asyncio loop: a stream of one sequence's events."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, Protocol

from serve.engine.sequence import EarlyEnd, Event, FinishEvent


class Stream:
    """The events of one sequence, in order; FinishEvent is the last, and always comes.

    Belongs to the asyncio loop that submitted the sequence.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, end: Callable[[Stream, EarlyEnd, int | None], None]
    ) -> None:
        self._loop, self._end = loop, end
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def cancel(self, reason: Literal["cancelled", "timeout"] = "cancelled") -> None:
        """End the sequence within one step; safe from any thread, and after the end."""
        self._end(self, reason, None)

    def stop(self, num_generated: int) -> None:
        """As cancel, where these many tokens are the whole answer: they hold a stop string."""
        self._end(self, "stop", num_generated)

    def ready(self) -> list[Event]:
        """The events that are here already, without waiting."""
        events = list(self._events)
        self._events.clear()
        return events

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()

    def put(self, event: Event) -> None:
        """Called in the loop, by Outbox."""
        self._events.append(event)
        self._ended = self._ended or isinstance(event, FinishEvent)
        self._arrived.set()


class Outbox(Protocol):
    """Where the engine thread leaves its events. `address`: what the submission came with."""

    def put(self, address: Any, event: Event) -> None: ...

    def flush(self) -> None:
        """Send what was put since the last time: a step's events."""


class StreamOutbox:
    """To Streams: collects a step's events and wakes each loop once. For one thread."""

    def __init__(self) -> None:
        self._pending: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Event]]] = {}

    def put(self, address: Stream, event: Event) -> None:
        self._pending.setdefault(address.loop, []).append((address, event))

    def flush(self) -> None:
        pending, self._pending = self._pending, {}
        for loop, events in pending.items():
            # A closed loop has nobody left to tell; asking first would leave it time to close.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_dispatch, events)


def _dispatch(events: list[tuple[Stream, Event]]) -> None:
    for stream, event in events:
        stream.put(event)
