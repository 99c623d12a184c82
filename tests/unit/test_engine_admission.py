"""What a refused client is told: how full it is, and when to try again. Time is simulated."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from serve.engine import (
    Engine,
    EngineConfig,
    FinishEvent,
    Gauges,
    NullObserver,
    SamplingParams,
    StepStats,
    Stream,
)
from serve.engine.admission import Admission
from serve.errors import OverloadedError
from tests.fakes import LIMITS, FakeRunner

pytestmark = pytest.mark.unit

PATIENCE = 60.0  # seconds of the test's own, after which a wait is a failure
PREFILL, DECODE = 1000, 100  # tokens a second
BOTH = ("prefill", "decode")


@dataclass(frozen=True)
class State:
    """`running`: what each has yet to generate. `waiting`: the max_tokens of each.

    num_unseen: so many of the last waiting ones, the engine has not seen yet.
    """

    running: Sequence[int] = ()
    waiting: Sequence[int] = ()
    prompt_tokens: int = 0  # of each that waits
    num_unseen: int = 0

    def admission(self, measured: Sequence[str] = BOTH) -> Admission:
        gauges: list[Gauges] = [Gauges()]
        admission = Admission(LIMITS, 1 << 20, 1 << 20, lambda: gauges[0])
        num_seen = len(self.waiting) - self.num_unseen
        seen = self.waiting[:num_seen]
        for max_tokens in (*self.running, *self.waiting):
            admission.enter(self.prompt_tokens, max_tokens)
        gauges[0] = Gauges(
            num_running=len(self.running),
            num_waiting=num_seen,
            num_waiting_tokens=num_seen * self.prompt_tokens,
            num_waiting_completion_tokens=sum(seen),
            num_running_completion_tokens=sum(self.running),
            num_entered_tokens=(len(self.running) + num_seen) * self.prompt_tokens,
            num_entered_completion_tokens=sum(self.running) + sum(seen),
        )
        if "prefill" in measured:
            admission.on_step(StepStats("prefill", 1.0, PREFILL, 1))
        if "decode" in measured:
            admission.on_step(StepStats("decode", 1.0, DECODE, 1))
        return admission

    def seconds(self, measured: Sequence[str] = BOTH) -> float:
        """What it says to somebody for whom there is no room."""
        with pytest.raises(OverloadedError) as caught:
            self.admission(measured).check_room(1 << 20, 0)
        return caught.value.retry_after_seconds


# -- in numbers


@pytest.mark.parametrize(
    ("state", "num_decoded"),
    [
        (State([700], [1]), 700),
        (State([700], [1, 1]), 700),  # a lone token comes with its prompt
        (State([300], [300]), 300),
        (State([300], [300, 300]), 300 + 299),
        (State([300], [300] * 4), 300 + 3 * 299),
        (State([50] * 32, [100] * 1024), 32 * 50 + 1024 * 99 - 99 * 33 / 2),
        (State([900] * 2, [501]), 1800),  # the mean of the running ones, at half the rate for each
        (State([400]), 400),
        (State([200] * 4), 800),
        (State([400], [0] * 9), 400),
        (State([300], [300, 300, 300], num_unseen=3), 300 + 2 * 299),
        (State([300], [300, 300, 300], num_unseen=1), 300 + 2 * 299),
    ],
)
def test_the_time_until_the_last_one_begins(state: State, num_decoded: float) -> None:
    assert state.seconds() == pytest.approx(num_decoded / DECODE if num_decoded < 60_000 else 600)


def test_a_queue_of_usual_size_is_not_capped() -> None:
    seconds = State([50] * 32, [100] * 512).seconds()
    assert seconds == pytest.approx((32 * 50 + 512 * 99 - 99 * 33 / 2) / DECODE)


def test_prompts_are_counted_at_their_own_rate() -> None:
    state = State([300], [300, 300], prompt_tokens=1500)
    assert state.seconds() == pytest.approx(2 * 1500 / PREFILL + (300 + 299) / DECODE)
    assert state.seconds(["prefill"]) == pytest.approx(3.0)
    assert State([300], [300, 300], 1500, num_unseen=2).seconds() == pytest.approx(3.0 + 5.99)


def test_unknown_little_and_very_much() -> None:
    assert State([700], [700]).seconds([]) == 1
    assert State([1], [1]).seconds() == 1
    assert State([5000], [5000] * 1000).seconds() == 600


def test_it_says_what_is_asked_for() -> None:
    admission = Admission(LIMITS, 1056, 100, Gauges)
    for _ in range(1023):
        admission.enter(0, 10)
    admission.check_room(33, 0)
    with pytest.raises(OverloadedError) as caught:
        admission.check_room(64, 0)
    assert caught.value.reason == "queue_full"
    assert str(caught.value) == (
        "1023 sequences are queued or running; with this request's 64 it would be over 1056; "
        "try again later"
    )


# -- against what then comes to pass


class Clock:
    """The engine's time: only steps take any, and only they move it."""

    now = 0.0
    monotonic = staticmethod(time.monotonic)  # for what waits in the test itself

    def perf_counter(self) -> float:
        return self.now


class Timed(FakeRunner):
    """Closes its gate before a step of a given number."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(replace(LIMITS, vocab_size=97, max_context=1024))
        self._clock, self.before = clock, -1

    def _step(self, what: str, seq_ids: Sequence[int]) -> None:
        if len(self.calls) == self.before:
            self.gate.clear()
        super()._step(what, seq_ids)
        self._clock.now += 0.08 if what == "prefill" else 0.05 + 0.01 * len(seq_ids)


class Times(NullObserver):
    """When sequences began and ended."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.began, self.ended = list[float](), list[float]()

    def on_first_token(self, seconds: float) -> None:  # noqa: ARG002
        self.began.append(self._clock.now)

    def on_finish(self, event: FinishEvent) -> None:  # noqa: ARG002
        self.ended.append(self._clock.now)


@contextlib.contextmanager
def simulated(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig
) -> Iterator[tuple[Engine, Timed, Times, Clock]]:
    clock = Clock()
    monkeypatch.setattr("serve.engine.engine.time", clock)
    runner, times = Timed(clock), Times(clock)
    engine = Engine(runner, config, times)
    engine.start()
    try:
        yield engine, runner, times, clock
    finally:
        runner.gate.set()
        asyncio.run(engine.drain(PATIENCE))


async def finished(stream: Stream) -> None:
    async with asyncio.timeout(PATIENCE):
        assert [event async for event in stream]


def submitter(engine: Engine, seed: int) -> Callable[[int], Stream]:
    """Prompts of 1 to 30 tokens, of which none is shared."""
    rng = random.Random(seed)

    def submit(max_tokens: int) -> Stream:
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        prompt = [rng.randrange(97) for _ in range(rng.randint(1, 30))]
        return engine.submit(prompt, params, share_key=None)

    return submit


SPREAD = [random.Random(1).randint(20, 200) for _ in range(40)]


@pytest.mark.parametrize(
    ("max_running", "lengths", "num_steps"),
    [
        (1, [700, 1], 5),
        (1, [700, 1, 1], 5),
        (1, [300, 300], 5),
        (1, [300, 300], 290),
        (1, [60] * 12, 30),
        (4, [100] * 40, 9),
        (4, [100] * 40, 90),
        (4, SPREAD, 60),
        (8, SPREAD, 150),
        (8, [300] * 8 + [2] * 30, 60),
        (8, [1] * 100, 2),
    ],
)
def test_it_is_when_the_last_one_begins(
    monkeypatch: pytest.MonkeyPatch, max_running: int, lengths: list[int], num_steps: int
) -> None:
    """`lengths` are all that fits. After some steps another one comes, and is told when to again.

    Within a factor of two, or a second. With one running and one waiting, a place is then free.
    """
    config = EngineConfig(max_running=max_running, max_waiting=len(lengths) - max_running)

    async def main(engine: Engine, runner: Timed, times: Times, clock: Clock) -> None:
        submit = submitter(engine, seed=max_running)
        await asyncio.gather(*(finished(submit(20)) for _ in range(max_running)))  # is measured
        times.began.clear()
        times.ended.clear()
        runner.gate.clear()
        streams = [submit(n) for n in lengths]
        runner.before = len(runner.calls) + num_steps
        assert await asyncio.to_thread(runner.at_gate.wait, PATIENCE)
        runner.at_gate.clear()
        runner.gate.set()
        assert await asyncio.to_thread(runner.at_gate.wait, PATIENCE)
        num_ended = len(times.ended)
        extra = [submit(lengths[-1]) for _ in range(num_ended)]  # full again
        with pytest.raises(OverloadedError) as caught:
            submit(1)
        told, since = caught.value.retry_after_seconds, clock.now
        runner.gate.set()
        await asyncio.gather(*map(finished, streams + extra))
        begins = times.began[-1] - since
        assert told / 2 - 1 <= begins <= 2 * told + 1
        if len(lengths) == 2:
            assert times.ended[0] - since == pytest.approx(told, rel=0.5)

    with simulated(monkeypatch, config) as parts:
        asyncio.run(main(*parts))
