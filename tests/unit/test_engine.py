"""The engine's promises: the right tokens, exactly one end for everybody, and a clean way out."""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from serve.engine import (
    Chunk,
    Engine,
    EngineConfig,
    EngineObserver,
    FinishEvent,
    Gauges,
    Logits,
    NullObserver,
    RunnerLimits,
    SamplingParams,
    StepStats,
    Stream,
    TokenEvent,
)
from serve.errors import ContextLengthError, EngineError, OverloadedError, RequestError
from tests.fakes import LIMITS, FakeRunner, Paced, hashed

pytestmark = pytest.mark.unit

PATIENCE = 60.0  # seconds after which a wait is a failure; no test measures time
SMALL = replace(LIMITS, vocab_size=97)
GREEDY = SamplingParams(max_tokens=5, temperature=0)


class Observer(NullObserver):
    """Keeps everything for a test to look at."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.first_tokens: list[float] = []
        self.num_preemptions = 0
        self.finishes: queue.SimpleQueue[FinishEvent] = queue.SimpleQueue()

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def on_preemption(self) -> None:
        self.num_preemptions += 1

    def on_finish(self, event: FinishEvent) -> None:
        self.finishes.put(event)


class BadRelease(FakeRunner):
    """Breaks when a sequence is to be released, after so many that went well."""

    def __init__(self, num_good: int = 0) -> None:
        super().__init__(SMALL)
        self._num_good = num_good

    def release(self, seq_id: int) -> None:
        if not self._num_good:
            raise OSError(f"cannot release {seq_id}")
        self._num_good -= 1
        super().release(seq_id)


class Holds(FakeRunner):
    """Closes its gate before the step of this number, counting from 0."""

    def __init__(self, before: int, limits: RunnerLimits = SMALL) -> None:
        super().__init__(limits)
        self._before = before

    def _step(self, what: str, seq_ids: Sequence[int]) -> None:
        if len(self.calls) == self._before:
            self.gate.clear()
        super()._step(what, seq_ids)


class NaNs(FakeRunner):
    """One sequence gets no logits worth the name."""

    def __init__(self, seq_id: int, limits: RunnerLimits = SMALL) -> None:
        super().__init__(limits)
        self._bad = seq_id

    def prefill(self, chunks: Sequence[Chunk]) -> Logits:
        return self._spoil(super().prefill(chunks), [chunk.seq_id for chunk in chunks])

    def decode(self, seq_ids: Sequence[int], token_ids: Sequence[int]) -> Logits:
        return self._spoil(super().decode(seq_ids, token_ids), seq_ids)

    def _spoil(self, logits: Logits, seq_ids: Sequence[int]) -> Logits:
        logits[np.array(seq_ids) == self._bad] = np.nan
        return logits


@contextlib.contextmanager
def running(
    runner: FakeRunner | None = None,
    config: EngineConfig | None = None,
    observer: EngineObserver | None = None,
) -> Iterator[Engine]:
    runner = runner or FakeRunner(SMALL)
    engine = Engine(runner, config, observer)
    engine.start()
    try:
        yield engine
    finally:
        runner.gate.set()
        asyncio.run(engine.drain(PATIENCE))
    assert engine.gauges() == Gauges(0, 0, 0, 0, runner.limits.num_pages)


async def read(stream: Stream) -> tuple[list[int], FinishEvent]:
    """All of it, which is tokens and then one end."""
    async with asyncio.timeout(PATIENCE):
        events = [event async for event in stream]
    *tokens, finish = events
    assert isinstance(finish, FinishEvent)
    ids = [event.token_id for event in tokens if isinstance(event, TokenEvent)]
    assert len(ids) == len(tokens)
    return ids, finish


async def tokens(stream: Stream) -> list[int]:
    return (await read(stream))[0]


def chain(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What the fake runner continues the prompt with."""
    ids, following = list(prompt), hashed(SMALL.vocab_size)
    for _ in range(num_tokens):
        ids.append(following(ids))
    return ids[len(prompt) :]


async def at_gate(runner: FakeRunner) -> None:
    assert await asyncio.to_thread(runner.at_gate.wait, PATIENCE)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells of."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.001)


# -- tokens and ends


def test_greedy_tokens() -> None:
    async def main(engine: Engine) -> None:
        prompts = [[n, n + 1, 3] for n in range(12)]
        streams = [engine.submit(prompt, GREEDY) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            ids, finish = await read(stream)
            assert ids == chain(prompt, 5)
            assert (finish.reason, finish.error) == ("length", None)
            assert (finish.num_prompt_tokens, finish.num_generated_tokens) == (3, 5)

    with running() as engine:
        asyncio.run(main(engine))


def test_one_token_takes_no_decode() -> None:
    runner = FakeRunner(SMALL)
    with running(runner) as engine:

        async def main() -> None:
            stream = engine.submit([1], replace(GREEDY, max_tokens=1))
            assert await tokens(stream) == chain([1], 1)

        asyncio.run(main())
    assert runner.calls == [("prefill", 1)]


def test_tokens_come_as_they_are_made() -> None:
    paced = Paced([1, 5, 6, 7])
    with running(FakeRunner(SMALL, paced)) as engine:

        async def main() -> None:
            stream = engine.submit([1], replace(GREEDY, max_tokens=3))
            for token_id in (5, 6, 7):
                assert stream.ready() == []
                paced.step()
                assert await anext(stream) == TokenEvent(token_id)
            assert isinstance(await anext(stream), FinishEvent)

        asyncio.run(main())


@pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 2), (1, 2), (2, 5)])
def test_stop_tokens(min_tokens: int, num_tokens: int) -> None:
    """At min_tokens 2 the second token may not be a stop: greedy takes the next best one."""
    stop = chain([1], 2)[1]
    params = replace(GREEDY, stop_token_ids=frozenset({stop, 10**9}), min_tokens=min_tokens)

    async def main(engine: Engine) -> None:
        stream = engine.submit([1], params)
        events = [event async for event in stream]
        finish = events.pop()
        assert isinstance(finish, FinishEvent)
        assert finish.num_generated_tokens == len(events) == num_tokens
        stops = [event.is_stop for event in events if isinstance(event, TokenEvent)]
        if min_tokens < 2:
            assert (finish.reason, stops) == ("stop", [False, True])
        else:
            assert (finish.reason, any(stops)) == ("length", False)
            assert TokenEvent(stop) not in events[:2]

    with running() as engine:
        asyncio.run(main(engine))


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    params = SamplingParams(max_tokens=12, seed=42, top_p=0.9, frequency_penalty=0.5)
    alone: list[list[int]] = []

    async def main(engine: Engine) -> None:
        stream = engine.submit([1, 2, 3], params)
        alone.append(await tokens(stream))
        company = [engine.submit([n], SamplingParams(max_tokens=n + 1)) for n in range(20)]
        again = [engine.submit([1, 2, 3], params) for _ in range(3)]
        assert await asyncio.gather(*map(tokens, again)) == alone[-1:] * 3
        await asyncio.gather(*map(tokens, company))

    for peak in (0.0, 2.0):
        with running(FakeRunner(SMALL, peak=peak)) as engine:
            asyncio.run(main(engine))
    assert alone[0] != alone[1]


def test_a_shared_prefix_changes_no_token_and_is_reported() -> None:
    prompt = list(range(40))

    async def main(engine: Engine) -> None:
        for expected in (0, 39, 39):
            ids, finish = await read(engine.submit(prompt, GREEDY))
            assert ids == chain(prompt, 5)
            assert finish.num_cached_tokens == expected
        _, finish = await read(engine.submit(prompt, GREEDY, share_key=None))
        assert finish.num_cached_tokens == 0
        _, finish = await read(engine.submit(prompt, GREEDY, share_key="another"))
        assert finish.num_cached_tokens == 0

    with running() as engine:
        asyncio.run(main(engine))


def test_timings_add_up() -> None:
    runner = FakeRunner(SMALL)

    async def main(engine: Engine) -> None:
        start = time.perf_counter()
        runner.gate.clear()
        streams = [engine.submit([1], GREEDY), engine.submit([2], GREEDY)]
        await at_gate(runner)
        streams[1].cancel()  # in the queue
        runner.gate.set()
        finishes = [(await read(stream))[1] for stream in streams]
        seconds = time.perf_counter() - start
        for finish in finishes:
            times = finish.timings
            parts = (times.queue_seconds, times.prefill_seconds, times.decode_seconds)
            assert min(parts) >= 0
            assert sum(parts) <= seconds
        first, second = (finish.timings for finish in finishes)
        assert first.prefill_seconds > 0
        assert first.decode_seconds > 0
        assert second.queue_seconds > 0
        assert (second.prefill_seconds, second.decode_seconds) == (0, 0)

    with running(runner, EngineConfig(max_running=1)) as engine:
        asyncio.run(main(engine))


def test_what_the_observer_is_told() -> None:
    observer, runner = Observer(), FakeRunner(SMALL)
    with running(runner, EngineConfig(prefill_chunk_tokens=8), observer) as engine:

        async def main() -> None:
            streams = [engine.submit([n] * 20, GREEDY, share_key=None) for n in range(3)]
            await asyncio.gather(*map(tokens, streams))

        asyncio.run(main())
    assert [observer.finishes.get(timeout=PATIENCE).reason for _ in range(3)] == ["length"] * 3
    assert observer.finishes.empty()
    prefills = [step for step in observer.steps if step.phase == "prefill"]
    decodes = [step for step in observer.steps if step.phase == "decode"]
    assert sum(step.num_tokens for step in prefills) == 60
    assert max(step.num_tokens for step in prefills) == 8
    assert sum(step.num_tokens for step in decodes) == 3 * 4
    assert all(step.num_tokens == step.num_sequences for step in decodes)
    assert len(observer.steps) == len(runner.calls)
    assert len(observer.first_tokens) == 3


def test_a_step_of_both_phases_is_told_as_two_with_its_seconds_shared_by_tokens() -> None:
    observer, runner = Observer(), FakeRunner(replace(SMALL, batch_invariant=True))
    runner.step_seconds = 0.01
    with running(runner, EngineConfig(prefill_chunk_tokens=8), observer) as engine:

        async def main() -> None:
            streams = [engine.submit([n] * 20, GREEDY, share_key=None) for n in range(3)]
            await asyncio.gather(*map(tokens, streams))

        asyncio.run(main())
    steps = observer.steps
    assert sum(step.num_tokens for step in steps if step.phase == "prefill") == 60
    assert sum(step.num_tokens for step in steps if step.phase == "decode") == 3 * 4
    assert len(steps) > len(runner.calls)
    pairs = [(a, b) for a, b in pairwise(steps) if (a.phase, b.phase) == ("prefill", "decode")]
    shared = [
        (a, b)
        for a, b in pairs
        if a.seconds / a.num_tokens == pytest.approx(b.seconds / b.num_tokens, rel=1e-9)
    ]
    assert len(shared) == len(steps) - len(runner.calls)
    for prefill, decode in shared:
        assert prefill.seconds + decode.seconds >= 0.01


# -- what cannot be served


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], GREEDY, "prompt"),
        ([97], GREEDY, "prompt"),
        ([1, -1], GREEDY, "prompt"),
        ([1], replace(GREEDY, max_tokens=-1), "max_tokens"),
        ([1], replace(GREEDY, logit_bias={97: 1.0}), "logit_bias"),
        ([1], replace(GREEDY, logit_bias={-1: 1.0}), "logit_bias"),
    ],
)
def test_bad_requests(prompt: list[int], params: SamplingParams, param: str) -> None:
    async def main(engine: Engine) -> None:
        with pytest.raises(RequestError) as caught:
            engine.submit(prompt, params)
        assert caught.value.param == param
        assert engine.gauges().num_waiting == 0
        assert len(await tokens(engine.submit([96], GREEDY))) == 5

    with running() as engine:
        asyncio.run(main(engine))


def test_context_length() -> None:
    async def main(engine: Engine) -> None:
        limit = engine.limits.max_context
        prompt = [1] * (limit - 5)
        with pytest.raises(ContextLengthError):
            engine.submit(prompt, replace(GREEDY, max_tokens=6))
        with pytest.raises(ContextLengthError):
            engine.submit([1] * limit, replace(GREEDY, max_tokens=1))
        assert len(await tokens(engine.submit(prompt, GREEDY))) == 5

    with running() as engine:
        asyncio.run(main(engine))


def test_a_submission_that_fails_is_not_counted() -> None:
    with running() as engine:
        with pytest.raises(RuntimeError):
            engine.submit([1], GREEDY)  # outside of any asyncio loop

        async def main() -> None:
            with pytest.raises(ValueError, match="non-negative"):
                engine.submit([1], replace(GREEDY, seed=-1))

        asyncio.run(main())
        assert engine.gauges().num_waiting == 0


@pytest.mark.parametrize(("max_running", "max_batch"), [(2, 8), (8, 2)])
def test_a_full_queue(max_running: int, max_batch: int) -> None:
    runner = FakeRunner(replace(SMALL, max_batch=max_batch))

    async def main(engine: Engine) -> None:
        runner.gate.clear()
        streams = [engine.submit([n], GREEDY) for n in range(5)]  # 2 run, 3 wait
        await at_gate(runner)
        for _ in range(2):
            with pytest.raises(OverloadedError) as caught:
                engine.submit([9], GREEDY)
            assert caught.value.retry_after_seconds > 0
        cancelled = streams.pop()
        cancelled.cancel()
        runner.gate.set()
        assert (await read(cancelled))[1].reason == "cancelled"
        streams.append(engine.submit([9], GREEDY))
        assert [len(ids) for ids in await asyncio.gather(*map(tokens, streams))] == [5] * 5

    with running(runner, EngineConfig(max_running=max_running, max_waiting=3)) as engine:
        asyncio.run(main(engine))


# -- gauges


def test_gauges_at_every_stage() -> None:
    runner = FakeRunner(SMALL)

    async def main(engine: Engine) -> None:
        assert engine.gauges() == Gauges(0, 0, 0, 0, 512)
        runner.gate.clear()
        streams = [engine.submit([1] * 8, replace(GREEDY, max_tokens=2))]
        await at_gate(runner)
        streams += [engine.submit([n] * 10, replace(GREEDY, max_tokens=2)) for n in range(2)]
        gauges = engine.gauges()
        assert (gauges.num_running, gauges.num_waiting) == (0, 3)  # as after the last step
        runner.gate.set()
        await asyncio.gather(*map(tokens, streams))
        assert engine.gauges() == Gauges(0, 0, 0, 0, 512)

    with running(runner, EngineConfig(max_running=1)) as engine:
        asyncio.run(main(engine))


def test_gauges_while_some_run_and_some_wait() -> None:
    paced = Paced(list(range(30)))
    runner = FakeRunner(SMALL, paced)

    async def main(engine: Engine) -> None:
        streams = [engine.submit([0, 1, 2, 3], replace(GREEDY, max_tokens=3)) for _ in range(4)]
        paced.step(2)  # before the second one the engine reads all that was submitted
        assert [await anext(streams[0]) for _ in range(2)] == [TokenEvent(4), TokenEvent(5)]
        assert engine.gauges() == Gauges(
            1, 3, 12, 2, 512, 9, 1
        )  # the newest token is in no page yet
        for stream in streams[1:]:
            stream.cancel()
        paced.step()
        assert await tokens(streams[0]) == [6]
        await asyncio.gather(*map(tokens, streams[1:]))
        assert engine.gauges() == Gauges(0, 0, 0, 0, 512)

    with running(runner, EngineConfig(max_running=1)) as engine:
        asyncio.run(main(engine))


# -- cancelling and stopping


@pytest.mark.parametrize("how", ["cancelled", "stop"])
@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_ending_a_sequence(when: str, how: str) -> None:
    runner = Holds(6 if when == "decode" else 1)
    config = EngineConfig(max_running=1, prefill_chunk_tokens=8)

    async def main(engine: Engine) -> None:
        streams = [engine.submit([1] * 30, GREEDY)]  # 4 steps of prefill, 4 of decode
        await at_gate(runner)
        streams.append(engine.submit([2], GREEDY))
        ended = streams[1 if when == "queued" else 0]
        if how == "stop":
            ended.stop(0)
        else:
            ended.cancel()
        ended.cancel()  # the second one changes nothing
        runner.gate.set()
        ids, finish = await read(ended)
        assert (finish.reason, finish.error) == (how, None)
        assert ids == (chain([1] * 30, 4) if when == "decode" else [])  # with the step under way's
        assert finish.num_generated_tokens == (0 if how == "stop" else len(ids))
        streams.remove(ended)
        assert (await read(streams[0]))[1].reason == "length"

    with running(runner, config) as engine:
        asyncio.run(main(engine))


def test_a_cancelled_sequence_takes_no_further_step() -> None:
    runner = FakeRunner(SMALL)

    async def main(engine: Engine) -> None:
        runner.gate.clear()
        stream = engine.submit([1], GREEDY)
        await at_gate(runner)
        await asyncio.to_thread(stream.cancel)  # from any thread
        runner.gate.set()
        ids, finish = await read(stream)
        assert (ids, finish.reason, finish.num_generated_tokens) == (chain([1], 1), "cancelled", 1)

    with running(runner) as engine:
        asyncio.run(main(engine))
    assert runner.calls == [("prefill", 1)]


def test_a_stop_says_how_much_the_client_takes() -> None:
    paced = Paced(list(range(30)))

    async def main(engine: Engine) -> None:
        stream = engine.submit([0], replace(GREEDY, max_tokens=20))
        paced.step(6)
        assert [await anext(stream) for _ in range(6)] == [TokenEvent(n) for n in range(1, 7)]
        stream.stop(4)
        paced.step()
        ids, finish = await read(stream)
        assert (finish.reason, finish.num_generated_tokens) == ("stop", 4)
        assert ids in ([], [7])  # of the step under way

    with running(FakeRunner(SMALL, paced)) as engine:
        asyncio.run(main(engine))


def test_ending_what_has_ended_changes_nothing() -> None:
    async def main(engine: Engine) -> None:
        stream = engine.submit([1], GREEDY)
        assert len(await tokens(stream)) == 5
        stream.cancel()
        stream.stop(3)
        assert len(await tokens(engine.submit([2], GREEDY))) == 5
        assert stream.ready() == []

    observer = Observer()
    with running(observer=observer) as engine:
        asyncio.run(main(engine))
    stream_ends = [observer.finishes.get(timeout=PATIENCE).reason for _ in range(2)]
    assert stream_ends == ["length"] * 2
    assert observer.finishes.empty()


# -- failures


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_failing_step_fails_its_own_sequences_only(phase: str) -> None:
    runner = Holds(2 if phase == "decode" else 0)

    async def main(engine: Engine) -> None:
        first = engine.submit([1] * 9, GREEDY)
        await at_gate(runner)
        waiting = engine.submit([2], GREEDY)
        runner.failure = OSError("out of luck")
        runner.gate.set()
        ids, finish = await read(first)
        assert ids == chain([1] * 9, 2 if phase == "decode" else 0)
        assert (finish.reason, finish.num_generated_tokens) == ("error", len(ids))
        assert isinstance(finish.error, EngineError)
        assert "luck" not in str(finish.error)  # internals are for the log
        assert await tokens(waiting) == chain([2], 5)
        ids, finish = await read(engine.submit([1] * 9, GREEDY))
        assert (ids, finish.num_cached_tokens) == (chain([1] * 9, 5), 0)  # nothing was kept
        assert engine.is_alive

    with running(runner, EngineConfig(max_running=1)) as engine:
        asyncio.run(main(engine))


def test_a_row_without_numbers_fails_one_sequence() -> None:
    async def main(engine: Engine) -> None:
        streams = [engine.submit([n], GREEDY) for n in range(4)]
        ends = [await read(stream) for stream in streams]
        assert [ids for ids, _ in ends] == [chain([n], 5) if n != 2 else [] for n in range(4)]
        assert [finish.reason for _, finish in ends] == ["length", "length", "error", "length"]

    with running(NaNs(2)) as engine:
        asyncio.run(main(engine))


def test_a_dead_engine_tells_everybody() -> None:
    runner = BadRelease()
    engine = Engine(runner, EngineConfig(max_running=2, prefix_sharing=False))
    engine.start()

    async def main() -> None:
        runner.gate.clear()
        streams = [engine.submit([n], replace(GREEDY, max_tokens=2 + n)) for n in range(6)]
        await at_gate(runner)
        streams += [engine.submit([n], GREEDY) for n in range(6)]  # it has not seen these
        runner.gate.set()
        for _, finish in await asyncio.gather(*map(read, streams)):
            assert finish.reason == "error"
            assert isinstance(finish.error, EngineError)
        await until(lambda: not engine.is_alive)
        assert not engine.is_accepting
        with pytest.raises(EngineError):
            engine.submit([1], GREEDY)
        streams[0].cancel()
        assert engine.gauges() == Gauges(0, 0, 0, 0, 512)
        await engine.drain(PATIENCE)

    asyncio.run(main())


@pytest.mark.parametrize("method", ["on_step", "on_first_token", "on_finish"])
def test_an_observer_that_raises_leaves_nobody_waiting(method: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    observer = Observer()
    setattr(observer, method, fail)
    runner = FakeRunner(SMALL)
    runner.gate.clear()
    engine = Engine(runner, None, observer)
    engine.start()

    async def main() -> None:
        streams = [engine.submit([n], GREEDY) for n in range(4)]
        runner.gate.set()
        reasons = {finish.reason for _, finish in await asyncio.gather(*map(read, streams))}
        assert "error" in reasons
        await engine.drain(PATIENCE)

    asyncio.run(main())
    assert not engine.is_alive
    assert engine.gauges() == Gauges(0, 0, 0, 0, 512)


def test_submitting_to_an_engine_that_dies() -> None:
    """Everybody is refused or told, whatever the moment."""
    for num_good in range(0, 60, 6):
        engine = Engine(BadRelease(num_good), EngineConfig(prefix_sharing=False))
        engine.start()

        async def client(engine: Engine) -> None:
            with contextlib.suppress(EngineError):
                while True:
                    ids, finish = await read(engine.submit([1], replace(GREEDY, max_tokens=1)))
                    assert finish.reason == "error" or ids == chain([1], 1)

        async def main(engine: Engine) -> None:
            await asyncio.gather(*(client(engine) for _ in range(5)))

        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(asyncio.run, main(engine)) for _ in range(3)]:
                future.result(PATIENCE)
        assert engine.gauges().num_waiting == 0


# -- draining


def test_draining_finishes_what_runs_and_takes_no_more() -> None:
    runner = FakeRunner(SMALL)
    engine = Engine(runner, EngineConfig(max_running=1))
    assert not engine.is_alive
    engine.start()
    assert engine.is_accepting

    async def main() -> None:
        runner.gate.clear()
        streams = [engine.submit([n], GREEDY) for n in range(3)]
        await at_gate(runner)
        draining = asyncio.create_task(engine.drain(PATIENCE))
        await until(lambda: not engine.is_accepting)
        assert engine.is_alive
        with pytest.raises(EngineError, match="shutting down"):
            engine.submit([9], GREEDY)
        runner.gate.set()
        await draining
        for n, stream in enumerate(streams):
            assert await tokens(stream) == chain([n], 5)
        assert not engine.is_alive
        assert engine.gauges() == Gauges(0, 0, 0, 0, 512)

    asyncio.run(main())


def test_draining_cancels_what_is_left_at_the_end() -> None:
    runner = FakeRunner(SMALL)
    engine = Engine(runner, EngineConfig(max_running=2))
    engine.start()

    async def main() -> None:
        runner.gate.clear()
        streams = [engine.submit([n], GREEDY) for n in range(5)]
        await at_gate(runner)
        draining = asyncio.create_task(engine.drain(0))
        await until(lambda: not engine.is_accepting)
        runner.gate.set()
        await draining
        for stream in streams:
            ids, finish = await read(stream)
            assert finish.reason == "cancelled"
            assert finish.num_generated_tokens == len(ids) <= 1
        assert engine.gauges() == Gauges(0, 0, 0, 0, 512)

    asyncio.run(main())


@pytest.mark.parametrize("at_once", [True, False])
def test_of_two_drains_the_earlier_end_counts(at_once: bool) -> None:
    """Whichever comes first. `hasten` does not wait."""
    runner = FakeRunner(SMALL)
    engine = Engine(runner)
    engine.start()

    async def main() -> None:
        runner.gate.clear()
        stream = engine.submit([1], replace(GREEDY, max_tokens=200))
        await at_gate(runner)
        drains = [asyncio.create_task(engine.drain(math.inf))]
        if at_once:
            drains.append(asyncio.create_task(engine.drain(0)))
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(0)
            engine.hasten(0)
        drains.append(asyncio.create_task(engine.drain(PATIENCE)))
        await asyncio.sleep(0.05)  # they look again
        assert not any(drain.done() for drain in drains)  # there is a step under way
        runner.gate.set()
        await asyncio.gather(*drains)
        ids, finish = await read(stream)
        assert (len(ids), finish.reason) == (1, "cancelled")

    asyncio.run(main())
    assert not engine.is_alive


def test_draining_an_idle_engine_twice_and_side_by_side() -> None:
    engine = Engine(FakeRunner(SMALL))
    engine.start()

    async def main() -> None:
        await asyncio.gather(engine.drain(PATIENCE), engine.drain(PATIENCE))
        await engine.drain(PATIENCE)

    asyncio.run(main())
    asyncio.run(engine.drain(0))
    assert not engine.is_alive
    assert not engine.is_accepting


def test_draining_an_engine_that_never_started() -> None:
    runner = FakeRunner(SMALL)
    engine = Engine(runner)

    async def main() -> None:
        streams = [engine.submit([n], GREEDY) for n in range(3)]
        assert engine.gauges().num_waiting == 3
        await engine.drain(0)
        assert [(await read(stream))[1].reason for stream in streams] == ["cancelled"] * 3

    asyncio.run(main())
    assert runner.calls == []


# -- loops and threads


def test_a_loop_that_closes_disturbs_no_other() -> None:
    runner = FakeRunner(SMALL)

    async def submit(engine: Engine) -> None:
        engine.submit([1], replace(GREEDY, max_tokens=50))
        await at_gate(runner)

    with running(runner) as engine:
        runner.gate.clear()
        asyncio.run(submit(engine))
        runner.gate.set()

        async def main() -> None:
            assert await tokens(engine.submit([2], GREEDY)) == chain([2], 5)

        asyncio.run(main())
        assert engine.is_alive


def test_many_loops_at_once() -> None:
    async def client(engine: Engine, first: int) -> None:
        prompts = [[(first + n) % 97, n] for n in range(12)]
        streams = [engine.submit(prompt, GREEDY) for prompt in prompts]
        for stream in streams[::4]:
            await asyncio.to_thread(stream.cancel)
        for n, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            ids, finish = await read(stream)
            assert ids == chain(prompt, 5)[: len(ids)]
            assert finish.reason == "length" or (n % 4 == 0 and finish.reason == "cancelled")

    with running(config=EngineConfig(max_running=5)) as engine, ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(asyncio.run, client(engine, 20 * n)) for n in range(4)]
        for future in clients:
            future.result(PATIENCE)


def test_one_thread_calls_the_runner() -> None:
    names = set()

    class Watched(FakeRunner):
        def prefill(self, chunks: Sequence[Chunk]) -> Logits:
            names.add(threading.current_thread().name)
            return super().prefill(chunks)

    async def main(engine: Engine) -> None:
        await tokens(engine.submit([1], GREEDY))

    with running(Watched(SMALL)) as engine:
        for _ in range(2):
            asyncio.run(main(engine))
    assert names == {"engine"}
