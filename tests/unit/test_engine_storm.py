"""Random loads on few pages, with cancels and failures at random moments.

Whatever happens, nobody gets another token than alone, and nothing is left over at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.engine import (
    Chunk,
    Engine,
    EngineConfig,
    Event,
    FinishEvent,
    Gauges,
    Logits,
    NullObserver,
    PromptEvent,
    RunnerLimits,
    SamplingParams,
    StepStats,
    Stream,
    TokenEvent,
)
from serve.engine.logprobs import log_probabilities
from serve.engine.sampler import choose
from serve.engine.sequence import Phase, Sequence
from serve.errors import EngineError
from tests.fakes import LIMITS, FakeConstraint, FakeRunner, looping

pytestmark = pytest.mark.unit

PEAK = 4.0  # low enough for the seeds to matter
VOCAB = 31
NEXT = looping(VOCAB)
PATIENCE = 60.0


@dataclass(frozen=True)
class Request:
    """A sequence, and the steps at which it comes and is cancelled. prompt: tail of a head.

    logprobs: as SamplingParams' num_logprobs and num_prompt_logprobs.
    """

    head: int
    head_length: int
    tail: tuple[int, ...]
    seed: int
    max_tokens: int
    kind: int
    share_key: str | None
    arrives: int
    cancelled: int | None
    logprobs: tuple[int | None, int | None] = (None, None)

    @property
    def prompt(self) -> tuple[int, ...]:
        return (*((self.head * 7 + n) % VOCAB for n in range(self.head_length)), *self.tail)

    @property
    def params(self) -> SamplingParams:
        return replace(
            KINDS[self.kind],
            seed=self.seed,
            max_tokens=self.max_tokens,
            num_logprobs=self.logprobs[0],
            num_prompt_logprobs=self.logprobs[1],
        )


LOGPROBS: list[tuple[int | None, int | None]] = [
    (None, None), (None, None), (None, None), (0, None), (3, None), (None, 2), (40, 0)
]  # fmt: skip
STOPS = frozenset({0, 1})
KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(stop_token_ids=STOPS, min_tokens=3),
    SamplingParams(temperature=1.5, top_p=0.9, repetition_penalty=1.5),
    SamplingParams(top_k=5, frequency_penalty=1.0, presence_penalty=0.5, logit_bias={3: 4.0}),
    SamplingParams(temperature=0, frequency_penalty=2.0, stop_token_ids=STOPS),
    SamplingParams(grammar="3 2 9 0", stop_token_ids=STOPS, min_tokens=4),
    SamplingParams(temperature=0, grammar="5 0 30 2", logit_bias={2: 1.0}),
]


@cache
def alone(request: Request) -> list[Event]:
    """What it gets from this runner, but for the end, with no engine and nobody else around."""
    runner = FakeRunner(replace(LIMITS, vocab_size=VOCAB), NEXT, PEAK)
    params, prompt, events = request.params, request.prompt, list[Event]()
    if params.num_prompt_logprobs is not None:
        rows = runner._logits([prompt[:n] for n in range(1, len(prompt))])
        pairs = zip(rows, prompt[1:], strict=True)
        known = [log_probabilities(row, i, params.num_prompt_logprobs) for row, i in pairs]
        events.append(PromptEvent((None, *known)))
    constraint = None if params.grammar is None else FakeConstraint(params.grammar)
    sequence = Sequence(0, prompt, params, constraint=constraint)
    while sequence.finish_reason() is None:
        [row] = runner._logits([sequence.token_ids])
        token_id = choose(row, sequence)
        assert token_id is not None
        sequence.append(token_id)
        top = params.num_logprobs
        logprobs = None if top is None else log_probabilities(row, token_id, top)
        events.append(TokenEvent(token_id, sequence.newest_is_stop(), logprobs))
    return events


@dataclass
class Setting:
    """An engine's capacities, and the steps that fail."""

    num_pages: int
    page_size: int
    max_batch: int
    max_step_tokens: int
    config: EngineConfig
    failing: frozenset[int] = frozenset()
    batch_invariant: bool = True

    @property
    def limits(self) -> RunnerLimits:
        max_context = min(200, self.num_pages * self.page_size)
        return RunnerLimits(
            VOCAB,
            max_context,
            self.max_batch,
            self.max_step_tokens,
            self.page_size,
            self.num_pages,
            self.batch_invariant,
        )


class FailingRunner(FakeRunner):
    """Some of its steps fail. Remembers a wrong call: to the engine it is a failing step, too."""

    def __init__(self, limits: RunnerLimits, failing: frozenset[int]) -> None:
        super().__init__(limits, NEXT, PEAK)
        self._failing = failing
        self.wrong_call: AssertionError | None = None

    def prefill(self, chunks: Seq[Chunk]) -> Logits:
        with self._remembering():
            return super().prefill(chunks)

    def decode(self, seq_ids: Seq[int], token_ids: Seq[int]) -> Logits:
        with self._remembering():
            return super().decode(seq_ids, token_ids)

    def verify(self, chunks: Seq[Chunk]) -> Logits:
        with self._remembering():
            return super().verify(chunks)

    def _step(self, what: str, seq_ids: Seq[int]) -> None:
        if len(self.calls) in self._failing:
            self.failure = OSError("a failing step")
        super()._step(what, seq_ids)

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self.wrong_call = error
            raise


@dataclass
class Watcher(NullObserver):
    """Compares budget and runner after every step, in the engine's thread."""

    runner: FakeRunner
    engine: Engine = field(init=False)
    num_finished: int = 0
    num_preemptions: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def on_step(self, stats: StepStats) -> None:
        for sequence in self.engine._batcher.running:
            assert (
                self.runner.tokens[sequence.seq_id] == sequence.token_ids[: sequence.num_computed]
            )
        budget = self.engine._batcher.budget
        assert budget.num_free == self.runner.num_free_pages()
        assert budget.num_free + budget.num_used + budget.num_evictable == budget.num_pages
        assert stats.num_sequences <= self.runner.limits.max_batch

    def on_finish(self, _: FinishEvent) -> None:
        self.num_finished += 1

    def on_preemption(self) -> None:
        self.num_preemptions += 1

    def on_speculation(self, num_drafted: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafted
        assert num_drafted > 0
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted


def make(setting: Setting) -> tuple[Engine, FailingRunner, Watcher]:
    runner = FailingRunner(setting.limits, setting.failing)
    watcher = Watcher(runner)
    watcher.engine = Engine(runner, setting.config, watcher, constrain=FakeConstraint)
    return watcher.engine, runner, watcher


def check_answer(request: Request, stream: Stream, can_fail: bool) -> None:
    *events, finish = stream.ready()
    assert isinstance(finish, FinishEvent)
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert len(tokens) == finish.num_generated_tokens
    expected = alone(request)
    if finish.reason in ("stop", "length"):
        assert events == expected
        assert (finish.reason == "stop") == any(token.is_stop for token in tokens)
    else:
        assert events == expected[: len(events)]
        assert len(events) < len(expected) or not expected
    if finish.reason == "cancelled":
        assert request.cancelled is not None
    assert (finish.reason == "error") == (finish.error is not None)
    if finish.reason == "error":
        assert can_fail
        assert "computed this sequence" in str(finish.error)
    assert finish.num_prompt_tokens == len(request.prompt)
    assert 0 <= finish.num_cached_tokens < len(request.prompt)
    if request.share_key is None or request.logprobs[1] is not None:
        assert finish.num_cached_tokens == 0


def check_empty(engine: Engine, runner: FailingRunner) -> None:
    assert runner.wrong_call is None
    batcher = engine._batcher
    assert engine.gauges() == Gauges(0, 0, 0, 0, runner.limits.num_pages)
    assert batcher.budget.num_used == 0
    if not engine._config.prefix_sharing:
        assert runner.tokens == {}
    assert len(runner.tokens) == len(batcher._prefixes) <= engine._config.max_kept_prefixes
    runner._thread = None  # from here on this thread calls it
    while batcher._release_evicted():
        pass
    assert runner.tokens == {}
    assert runner.num_free_pages() == batcher.budget.num_free == runner.limits.num_pages


# -- step by step


class Steps:
    """Takes an engine's steps in the test's own thread, so that each moment is a known one."""

    def __init__(self, engine: Engine, runner: FakeRunner) -> None:
        self.engine, self.runner = engine, runner
        self._waited: set[Sequence] = set()  # decoding, and got no token in the last step

    async def step(self) -> None:
        engine = self.engine
        while not engine._inbox.empty():
            item = engine._inbox.get()
            engine._handle(item)  # type: ignore[arg-type]  # nobody shuts it down
        decoding = {s: s.num_generated for s in engine._batcher.running if s.phase is Phase.DECODE}
        engine._step()
        engine._publish()
        await asyncio.sleep(0)  # the events arrive
        waited = {s for s, n in decoding.items() if s.num_generated == n}.intersection(
            s for s in engine._batcher.running if s.phase is Phase.DECODE
        )
        assert not waited & self._waited
        assert self._alternates or not waited
        self._waited = waited

    @property
    def _alternates(self) -> bool:
        limits = self.runner.limits
        return not limits.batch_invariant or limits.max_step_tokens < limits.max_batch

    @property
    def is_busy(self) -> bool:
        return bool(self.engine._live) or not self.engine._inbox.empty()


async def storm(setting: Setting, requests: Seq[Request]) -> Watcher:
    engine, runner, watcher = make(setting)
    steps, now = Steps(engine, runner), 0
    streams: dict[int, Stream] = {}
    while len(streams) < len(requests) or steps.is_busy:
        for n, request in enumerate(requests):
            if request.arrives == now:
                streams[n] = engine.submit(request.prompt, request.params, request.share_key)
            if request.cancelled == now:
                streams[n].cancel()
        await steps.step()
        now += 1
        assert now < 20_000, "it never ends"
    assert watcher.num_finished == len(requests)
    for n, request in enumerate(requests):
        check_answer(request, streams[n], bool(setting.failing))
        streams[n].cancel()  # changes nothing
    await steps.step()
    assert not any(stream.ready() for stream in streams.values())
    check_empty(engine, runner)
    return watcher


@st.composite
def loads(draw: st.DrawFn) -> tuple[Setting, list[Request]]:
    page_size = draw(st.integers(1, 5))
    num_pages = draw(st.integers(-(-40 // page_size), 100 // page_size))
    config = EngineConfig(
        max_running=draw(st.integers(1, 8)),
        prefill_chunk_tokens=draw(st.integers(1, 40)),
        prefix_sharing=draw(st.booleans()),
        max_kept_prefixes=draw(st.integers(0, 6)),
        speculative_tokens=draw(st.sampled_from([0, 1, 3, 8])),
    )
    failing = draw(st.frozensets(st.integers(0, 60), max_size=4))
    setting = Setting(
        num_pages,
        page_size,
        max_batch=draw(st.integers(1, 8)),
        max_step_tokens=draw(st.integers(4, 40)),
        config=config,
        failing=failing,
        batch_invariant=draw(st.booleans()),
    )
    return setting, draw(st.lists(requests(), min_size=1, max_size=14))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """At most 40 tokens in all."""
    head_length = draw(st.integers(0, 14))
    tail = draw(st.lists(st.integers(0, 2), min_size=0 if head_length else 1, max_size=8))
    arrives = draw(st.integers(0, 40))
    after = draw(st.none() | st.integers(0, 60))
    return Request(
        head=draw(st.integers(0, 2)),
        head_length=head_length,
        tail=tuple(tail),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(0, 18)),
        kind=draw(st.integers(0, len(KINDS) - 1)),
        share_key=draw(st.sampled_from(["", "", "", "a", None])),
        arrives=arrives,
        cancelled=None if after is None else arrives + after,
        logprobs=draw(st.sampled_from(LOGPROBS)),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(loads())
def test_any_load(load: tuple[Setting, list[Request]]) -> None:
    asyncio.run(storm(*load))


def random_requests(rng: random.Random, number: int, cancels: bool) -> list[Request]:
    """Longer ones, all of them early."""
    made = []
    for _ in range(number):
        arrives = rng.randrange(30)
        made.append(
            Request(
                head=rng.randrange(2),
                head_length=rng.randrange(1, 40),
                tail=tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(6))),
                seed=rng.randrange(1000),
                max_tokens=rng.randrange(50),
                kind=rng.randrange(len(KINDS)),
                share_key=rng.choice(["", "", "", "a", None]),
                arrives=arrives,
                cancelled=arrives + rng.randrange(150) if cancels and rng.random() < 0.3 else None,
                logprobs=rng.choice(LOGPROBS),
            )
        )
    return made


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_on_few_pages(seed: int, sharing: bool) -> None:
    """Enough sequences for many preemptions, prefixes and evictions at once."""
    rng = random.Random(seed)
    config = EngineConfig(
        max_running=12,
        prefill_chunk_tokens=24,
        prefix_sharing=sharing,
        max_kept_prefixes=6,
        speculative_tokens=5,
    )
    failing = frozenset(rng.sample(range(200), 5)) if seed % 2 else frozenset()
    setting = Setting(30, 4, 12, 64, config, failing, batch_invariant=seed % 3 > 0)
    watcher = asyncio.run(storm(setting, random_requests(rng, 60, cancels=seed >= 2)))
    assert watcher.num_preemptions > 5
    assert (watcher.num_accepted > 20) == setting.batch_invariant
    assert (watcher.num_drafted > watcher.num_accepted) == setting.batch_invariant


# -- in the engine's own thread


async def ends(streams: Seq[Stream]) -> None:
    """Wait until all have ended, and leave their events where they are."""
    async with asyncio.timeout(PATIENCE):
        while not all(stream._ended for stream in streams):
            await asyncio.sleep(0.001)


async def client(engine: Engine, requests: Seq[Request], rng: random.Random) -> list[Stream]:
    """Sends them a few at a time, and cancels some at a moment that nobody knows."""
    streams = []
    for request in requests:
        stream = engine.submit(request.prompt, request.params, request.share_key)
        streams.append(stream)
        if rng.random() < 0.5:
            await asyncio.sleep(0)
        if request.cancelled is not None:
            chosen = rng.choice(streams)
            if requests[streams.index(chosen)].cancelled is not None:
                chosen.cancel()
    await ends(streams)
    return streams


@pytest.mark.parametrize("seed", range(3))
def test_several_threads(seed: int) -> None:
    rng = random.Random(seed)
    config = EngineConfig(
        max_running=8, prefill_chunk_tokens=16, max_kept_prefixes=5, speculative_tokens=3
    )
    setting = Setting(30, 4, 8, 64, config, frozenset(rng.sample(range(100), 3)))
    engine, runner, watcher = make(setting)
    engine.start()
    loads = [random_requests(rng, 20, cancels=True) for _ in range(4)]
    with ThreadPoolExecutor(len(loads)) as pool:
        running = [
            pool.submit(asyncio.run, client(engine, load, random.Random(n)))
            for n, load in enumerate(loads)
        ]
        answers = [future.result(PATIENCE) for future in running]
    for load, streams in zip(loads, answers, strict=True):
        for request, stream in zip(load, streams, strict=True):
            check_answer(request, stream, can_fail=True)
    assert watcher.num_finished == 80
    assert engine.is_alive
    asyncio.run(engine.drain(PATIENCE))
    check_empty(engine, runner)


@pytest.mark.parametrize("seconds", [0.0, PATIENCE])
def test_draining_in_the_middle_of_a_storm(seconds: float) -> None:
    """Whoever was taken in is told; whoever is told that all went well has all tokens."""
    rng = random.Random(5)
    config = EngineConfig(max_running=8, prefill_chunk_tokens=16, max_kept_prefixes=5)
    engine, runner, watcher = make(Setting(30, 4, 8, 64, config))
    engine.start()
    enough = threading.Semaphore(0)
    load = [replace(r, cancelled=0) for r in random_requests(rng, 400, cancels=False)]

    async def submit(part: Seq[Request]) -> list[tuple[Request, Stream]]:
        taken: list[tuple[Request, Stream]] = []
        for request in part:
            try:
                stream = engine.submit(request.prompt, request.params, request.share_key)
            except EngineError:
                break
            taken.append((request, stream))
            enough.release()
            await asyncio.sleep(0)
        await ends([stream for _, stream in taken])
        return taken

    async def drain() -> None:
        for _ in range(20):
            await asyncio.to_thread(enough.acquire)
        await engine.drain(seconds)

    with ThreadPoolExecutor(5) as pool:
        parts = [pool.submit(asyncio.run, submit(load[n::4])) for n in range(4)]
        pool.submit(asyncio.run, drain()).result(PATIENCE)
        taken = [pair for part in parts for pair in part.result(PATIENCE)]
    assert watcher.num_finished == len(taken) >= 20
    for request, stream in taken:
        check_answer(request, stream, can_fail=False)
    check_empty(engine, runner)


def test_an_engine_that_dies_in_the_middle_of_a_storm() -> None:
    """Everybody is told, and nobody got a wrong token."""

    class Dies(FakeRunner):
        def release(self, seq_id: int) -> None:
            if len(self.calls) > 60:
                raise OSError("the device is gone")
            super().release(seq_id)

    rng = random.Random(6)
    runner = Dies(Setting(30, 4, 8, 64, EngineConfig()).limits, NEXT, PEAK)
    config = EngineConfig(max_running=8, prefix_sharing=False, speculative_tokens=4)
    engine = Engine(runner, config, constrain=FakeConstraint)
    engine.start()
    load = random_requests(rng, 200, cancels=False)

    async def submit(part: Seq[Request]) -> list[tuple[Request, Stream]]:
        taken = []
        for request in part:
            try:
                stream = engine.submit(request.prompt, request.params, request.share_key)
            except EngineError:
                break
            taken.append((request, stream))
            await asyncio.sleep(0)
        await ends([stream for _, stream in taken])
        return taken

    with ThreadPoolExecutor(4) as pool:
        parts = [pool.submit(asyncio.run, submit(load[n::4])) for n in range(4)]
        taken = [pair for part in parts for pair in part.result(PATIENCE)]
    reasons = set()
    for request, stream in taken:
        *events, finish = stream.ready()
        assert isinstance(finish, FinishEvent)
        reasons.add(finish.reason)
        assert events == alone(request)[: len(events)]
        assert finish.reason == "error" or events == alone(request)
    assert "error" in reasons
    assert not engine.is_alive
    assert engine.gauges() == Gauges(0, 0, 0, 0, runner.limits.num_pages)
