"""Events reach the loop they belong to, in order, once; a loop that is gone disturbs nobody."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from serve.engine import Event, FinishEvent, Stream, TokenEvent
from serve.engine.sequence import EarlyEnd
from serve.engine.stream import StreamOutbox

pytestmark = pytest.mark.unit

END = FinishEvent("length", 1, 3)
EVENTS: list[Event] = [TokenEvent(1), TokenEvent(2), TokenEvent(3), END]


def ignore(stream: Stream, reason: EarlyEnd, num_generated: int | None) -> None:
    """For streams that nobody ends."""


def make_stream() -> Stream:
    return Stream(asyncio.get_running_loop(), ignore)


async def read(stream: Stream) -> list[Event]:
    return [event async for event in stream]


@pytest.mark.parametrize("num_early", range(len(EVENTS) + 1))
def test_some_before_and_some_while_it_is_read(num_early: int) -> None:
    async def main() -> list[Event]:
        stream = make_stream()
        for event in EVENTS[:num_early]:
            stream.put(event)
        reader = asyncio.create_task(read(stream))
        for event in EVENTS[num_early:]:
            await asyncio.sleep(0)
            stream.put(event)
        return await reader

    assert asyncio.run(main()) == EVENTS


def test_after_the_end_there_is_nothing() -> None:
    async def main() -> None:
        stream = make_stream()
        for event in EVENTS:
            stream.put(event)
        assert await read(stream) == EVENTS
        assert await read(stream) == []
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_two_readers_share_the_events_and_both_end() -> None:
    async def main() -> None:
        stream = make_stream()
        readers = [asyncio.create_task(read(stream)) for _ in range(2)]
        await asyncio.sleep(0)
        for event in EVENTS:
            stream.put(event)
        first, second = await asyncio.gather(*readers)
        assert sorted(map(repr, first + second)) == sorted(map(repr, EVENTS))

    asyncio.run(main())


def test_a_reader_that_gives_up_loses_nothing() -> None:
    async def main() -> None:
        stream = make_stream()
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        waiting.cancel()
        for event in EVENTS:
            stream.put(event)
        assert await read(stream) == EVENTS

    asyncio.run(main())


def test_ready() -> None:
    async def main() -> None:
        stream = make_stream()
        assert stream.ready() == []
        for event in EVENTS:
            stream.put(event)
        assert await anext(stream) == EVENTS[0]
        assert stream.ready() == EVENTS[1:]
        assert stream.ready() == []
        assert await read(stream) == []

    asyncio.run(main())


def test_cancel_and_stop() -> None:
    asked: list[tuple[Stream, EarlyEnd, int | None]] = []
    streams: list[Stream] = []

    async def main() -> None:
        stream = Stream(asyncio.get_running_loop(), lambda *asked_for: asked.append(asked_for))
        streams.append(stream)
        stream.cancel()
        stream.stop(7)

    asyncio.run(main())
    assert asked == [(streams[0], "cancelled", None), (streams[0], "stop", 7)]


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread wakes it."""

    num_calls = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        self.num_calls += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def in_a_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_step_wakes_a_loop_once() -> None:
    loop = CountingLoop()

    async def main() -> None:
        streams, outbox = [make_stream() for _ in range(3)], StreamOutbox()
        for event in EVENTS:
            for stream in streams:
                outbox.put(stream, event)
        before = loop.num_calls
        in_a_thread(outbox.flush)
        in_a_thread(outbox.flush)  # nothing is left
        assert loop.num_calls == before + 1
        for stream in streams:
            assert await read(stream) == EVENTS

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


class ClosingLoop(asyncio.SelectorEventLoop):
    """Closes at the last moment: it was open when it was asked."""

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        self.close()
        return super().call_soon_threadsafe(*args, **kwargs)


def test_a_loop_that_has_closed_disturbs_no_other() -> None:
    async def make() -> Stream:
        return make_stream()

    closed = [asyncio.run(make()), ClosingLoop().run_until_complete(make())]

    async def main() -> None:
        outbox, stream = StreamOutbox(), make_stream()
        for event in EVENTS:
            for receiver in (closed[0], stream, closed[1]):
                outbox.put(receiver, event)
        in_a_thread(outbox.flush)
        assert await read(stream) == EVENTS

    asyncio.run(main())
    assert [stream.ready() for stream in closed] == [[], []]
