"""Engines in a process of their own, over a fake runner: what is said, and what its death does."""

from __future__ import annotations

import asyncio
import math
import os
import queue
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from unittest.mock import ANY

import pytest

from serve.engine import (
    FinishEvent,
    Gauges,
    NullObserver,
    SamplingParams,
    StepStats,
    Stream,
    TokenEvent,
    messages,
)
from serve.engine.remote import EngineProcess, HostProcess, RemoteEngine
from serve.errors import EngineError, LoadError, OverloadedError, RequestError
from tests.fakes import LIMITS, hashed

pytestmark = pytest.mark.unit

PATIENCE = 60.0
GREEDY = SamplingParams(max_tokens=5, temperature=0)
LONG = SamplingParams(max_tokens=200, temperature=0)
STUCK, CRASH, SLOW = [13, 1], [14, 1], [15, 1]  # prompts, see tests/fake_host.py
NEXT = hashed()


class Watcher(NullObserver):
    """Remembers."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.finishes: list[FinishEvent] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_finish(self, event: FinishEvent) -> None:
        self.finishes.append(event)


class Hosted:
    """A process, the deaths that it told of, and one engine's observer."""

    def __init__(self, max_step_seconds: float = PATIENCE) -> None:
        self.host = HostProcess([sys.executable, "-m", "tests.fake_host"])
        self.deaths: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.process = EngineProcess(self.host, max_step_seconds, self.deaths.put)
        self.watcher, self.phases = Watcher(), list[str]()

    def load(self, key: str, request: str = "") -> RemoteEngine:
        future = self.process.load(key, request, self.phases.append, lambda _: self.watcher)
        return future.result(PATIENCE)


@pytest.fixture
def hosted() -> Iterator[Hosted]:
    found = Hosted()
    yield found
    found.process.stop()
    found.host.kill()


async def read(stream: Stream) -> tuple[list[int], FinishEvent]:
    async with asyncio.timeout(PATIENCE):
        *events, finish = [event async for event in stream]
    assert isinstance(finish, FinishEvent)
    return [event.token_id for event in events if isinstance(event, TokenEvent)], finish


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(NEXT(ids))
    return ids[len(prompt) :]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(PATIENCE):
            await main()

    asyncio.run(timed())


def test_it_is_an_engine(hosted: Hosted) -> None:
    engine = hosted.load("a", "this")
    assert hosted.phases == ["preparing"]
    assert engine.about == {"asked": "this"}
    assert engine.limits == LIMITS
    assert engine.is_accepting
    prompts = [[n, n + 1, n + 2] for n in range(4)]

    async def main() -> None:
        answers = await asyncio.gather(*(read(engine.submit(p, GREEDY)) for p in prompts))
        for prompt, (tokens, finish) in zip(prompts, answers, strict=True):
            assert tokens == expected(prompt, 5)
            assert (finish.reason, finish.num_prompt_tokens) == ("length", 3)
        with pytest.raises(RequestError, match="empty"):
            engine.submit([], GREEDY)

    run(main)
    assert len(hosted.watcher.finishes) == 4
    assert sum(s.num_tokens for s in hosted.watcher.steps if s.phase == "prefill") == 12
    until(lambda: engine.gauges() == Gauges(num_pages_total=LIMITS.num_pages))


def test_cancel_and_stop(hosted: Hosted) -> None:
    engine = hosted.load("a")

    async def main() -> None:
        stream = engine.submit([1], LONG)
        await anext(stream)
        stream.cancel("timeout")
        assert (await read(stream))[1].reason == "timeout"
        stopped = engine.submit([2], LONG)
        await anext(stopped)
        stopped.stop(1)
        finish = (await read(stopped))[1]
        assert (finish.reason, finish.num_generated_tokens) == ("stop", 1)
        stopped.cancel()  # after the end

    run(main)


def test_a_full_queue_is_refused_in_front(hosted: Hosted) -> None:
    engine = hosted.load("a")

    async def main() -> None:
        streams = [engine.submit([n], LONG) for n in range(6)]
        with pytest.raises(OverloadedError):
            engine.submit([7], LONG)
        for stream in streams:
            stream.cancel()
        assert {(await read(stream))[1].reason for stream in streams} <= {"cancelled", "length"}
        assert (await read(engine.submit([7], GREEDY)))[0] == expected([7], 5)

    run(main)


def test_loads_that_fail(hosted: Hosted) -> None:
    with pytest.raises(LoadError, match="there is no such thing"):
        hosted.load("a", "fail")
    with pytest.raises(LoadError, match="ZeroDivisionError: unforeseen"):
        hosted.load("a", "break")
    assert hosted.load("a").is_alive


def test_two_engines_and_an_unload(hosted: Hosted) -> None:
    first, second = hosted.load("a"), hosted.load("b")
    with pytest.raises(ValueError, match="is loaded"):
        hosted.load("a")

    async def main() -> None:
        running = first.submit([1], GREEDY)
        answer = asyncio.create_task(read(running))
        await asyncio.gather(first.drain(PATIENCE), first.drain(PATIENCE))
        assert (await answer)[0] == expected([1], 5)  # it was let finish
        with pytest.raises(EngineError, match="takes no more"):
            first.submit([1], GREEDY)
        assert (await read(second.submit([2], GREEDY)))[0] == expected([2], 5)

    run(main)
    assert hosted.load("a").is_accepting


@pytest.mark.parametrize("first", [math.inf, 2 * PATIENCE])
@pytest.mark.parametrize("second", [0, 0.1])
def test_a_second_drain_may_end_the_first(hosted: Hosted, first: float, second: float) -> None:
    engine = hosted.load("a")

    async def main() -> None:
        stream = engine.submit(SLOW, LONG)
        await anext(stream)
        draining = asyncio.create_task(engine.drain(first))
        await asyncio.sleep(0)
        await engine.drain(second)
        assert (await read(stream))[1].reason == "cancelled"
        await draining

    run(main)
    assert hosted.load("a").is_accepting


def test_a_second_drain_gives_no_more_time(hosted: Hosted) -> None:
    engine = hosted.load("a")

    async def main() -> None:
        stream = engine.submit(SLOW, LONG)
        await anext(stream)
        await asyncio.gather(engine.drain(0.1), engine.drain(math.inf), engine.drain(2 * PATIENCE))
        assert (await read(stream))[1].reason == "cancelled"

    run(main)


def test_without_an_end_what_runs_finishes(hosted: Hosted) -> None:
    engine = hosted.load("a")

    async def main() -> None:
        stream = engine.submit([1], LONG)
        await engine.drain(math.inf)
        assert await read(stream) == (expected([1], 200), ANY)

    run(main)


def test_an_engine_that_is_gone_is_drained(hosted: Hosted) -> None:
    """Its name may be another's by then, which goes on."""
    gone, other = hosted.load("a"), hosted.load("b")
    asyncio.run(gone.drain(0))
    asyncio.run(gone.drain(0))
    again = hosted.load("a")

    async def main() -> None:
        await gone.drain(0)
        for engine in (again, other):
            assert (await read(engine.submit([1], GREEDY)))[0] == expected([1], 5)

    run(main)


@pytest.mark.parametrize("request_", ["", "fail"])
def test_whoever_waits_for_a_load_may_give_up(hosted: Hosted, request_: str) -> None:
    async def main() -> None:
        future = hosted.process.load("a", request_, hosted.phases.append, lambda _: hosted.watcher)
        await give_up(asyncio.wrap_future(future))

    run(main)
    assert hosted.load("b").is_accepting  # it was made after "a"


def test_whoever_waits_for_an_unload_may_give_up(hosted: Hosted) -> None:
    """The others go on waiting, and it goes on."""
    engine = hosted.load("a")

    async def main() -> None:
        stream = engine.submit(SLOW, LONG)
        await anext(stream)
        waiting = asyncio.create_task(engine.drain(math.inf))
        await give_up(asyncio.create_task(engine.drain(math.inf)))
        assert not waiting.done()
        stream.cancel()
        await waiting

    run(main)
    assert hosted.load("a").is_accepting


def test_a_death_after_they_gave_up() -> None:
    found = Hosted()
    engine = found.load("a")

    async def main() -> None:
        await anext(engine.submit(SLOW, LONG))
        future = found.process.load("b", "stall", found.phases.append, lambda _: found.watcher)
        await give_up(asyncio.wrap_future(future))
        await give_up(asyncio.create_task(engine.drain(math.inf)))

    run(main)
    os.kill(found.process.pid, signal.SIGKILL)
    assert "SIGKILL" in found.deaths.get(timeout=PATIENCE)
    found.process.stop()


async def give_up(waiting: asyncio.Future[Any]) -> None:
    """After it has begun; what that does has been done when this returns."""
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await asyncio.sleep(0)


@pytest.mark.parametrize("how", ["killed", "crash", "stuck", "halted"])
def test_death(how: str) -> None:
    """Whoever waits is told, what is asked later is refused, and the reason is given."""
    found = Hosted(max_step_seconds=1.0 if how in ("stuck", "halted") else PATIENCE)
    engine = found.load("a")

    async def main() -> None:
        streams = [engine.submit([1], LONG), engine.submit([2], LONG)]
        for stream in streams:
            await anext(stream)
        if how in ("killed", "halted"):
            number = signal.SIGKILL if how == "killed" else signal.SIGSTOP
            os.kill(found.process.pid, number)
        else:
            streams.append(engine.submit(CRASH if how == "crash" else STUCK, LONG))
        finishes = [(await read(stream))[1] for stream in streams]
        assert "error" in [finish.reason for finish in finishes]
        assert all(isinstance(f.error, EngineError) for f in finishes if f.reason == "error")
        with pytest.raises(EngineError, match="has failed"):
            engine.submit([1], GREEDY)

    run(main)
    told = found.deaths.get(timeout=PATIENCE)
    assert ("SIGABRT" if how == "crash" else "SIGKILL") in told
    assert ("stuck" in told) == (how in ("stuck", "halted"))
    assert not found.process.is_alive
    assert not engine.is_alive
    with pytest.raises(EngineError, match="has ended"):
        found.load("b")
    asyncio.run(engine.drain(PATIENCE))  # nothing is left to wait for
    found.process.stop()


def test_an_end_that_was_asked_for_is_no_death(hosted: Hosted) -> None:
    engine = hosted.load("a")
    hosted.process.stop()
    assert not engine.is_alive
    assert hosted.deaths.empty()
    assert hosted.host.process.returncode == 0


def test_what_comes_after_an_engines_death_is_nobodys(hosted: Hosted) -> None:
    """A step that was on its way when the engine's death was told."""

    async def main() -> None:
        first, other = hosted.load("a"), hosted.load("b")
        stream = first.submit([1, 2], LONG)
        hosted.process._handle(messages.Pulse({}, ["a"]))
        late = FinishEvent("error", 2, 0, error=EngineError("gone"))
        hosted.process._handle(messages.Step("a", [(0, late)], [], Gauges()))
        _, end = await read(stream)
        assert end.reason == "error"
        ids, _ = await read(other.submit([1, 2, 3], GREEDY))
        assert ids == expected([1, 2, 3], 5)

    asyncio.run(main())


def test_what_cannot_be_handled_is_a_death(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = hosted.load("a")
        stream = engine.submit(STUCK, LONG)
        monkeypatch.setattr(hosted.process, "_handle", lambda _: 1 / 0)
        _, end = await read(stream)
        assert end.reason == "error"
        assert not engine.is_alive

    asyncio.run(main())
    assert hosted.deaths.get(timeout=PATIENCE)
