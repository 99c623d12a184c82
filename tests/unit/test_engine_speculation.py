"""Speculative decoding: the same answers in fewer steps, whatever ends them, and its counts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest

from serve.engine import (
    Engine,
    EngineConfig,
    Event,
    FinishEvent,
    RunnerLimits,
    SamplingParams,
    TokenEvent,
)
from tests.fakes import FakeConstraint, FakeRunner, NextToken, Paced
from tests.unit.test_engine import PATIENCE, SMALL, Observer

pytestmark = pytest.mark.unit

LIMITS = replace(SMALL, batch_invariant=True)
ON = EngineConfig(speculative_tokens=4)
PROMPT = [10, 11, 12, 13, 14, 15]
GREEDY = SamplingParams(max_tokens=30, temperature=0)


class Watcher(Observer):
    def __init__(self) -> None:
        super().__init__()
        self.speculations: list[tuple[int, int]] = []
        self.num_gaps = 0

    def on_speculation(self, num_drafted: int, num_accepted: int) -> None:
        self.speculations.append((num_drafted, num_accepted))

    def on_inter_token(self, seconds: float) -> None:
        assert seconds >= 0
        self.num_gaps += 1


def around(ids: Sequence[int]) -> int:
    """10, 11, 12, 13, 14, 15, 10, 11 and so on."""
    return ids[-1] + 1 if ids[-1] < 15 else 10


def run(
    *requests: tuple[Sequence[int], SamplingParams],
    config: EngineConfig = ON,
    observer: Watcher | None = None,
    next_token: NextToken = around,
    peak: float = 100.0,
    limits: RunnerLimits = LIMITS,
) -> tuple[list[list[Event]], FakeRunner]:
    """All events of each request, side by side, but for the times of the ends."""
    runner = FakeRunner(limits, next_token, peak)
    engine = Engine(runner, config, observer, constrain=FakeConstraint)
    engine.start()

    async def one(prompt: Sequence[int], params: SamplingParams) -> list[Event]:
        async with asyncio.timeout(PATIENCE):
            *events, finish = [event async for event in engine.submit(prompt, params)]
        assert isinstance(finish, FinishEvent)
        return [*events, replace(finish, timings=type(finish.timings)())]

    async def main() -> list[list[Event]]:
        answers = await asyncio.gather(*(one(*request) for request in requests))
        await engine.drain(PATIENCE)
        return answers

    return asyncio.run(main()), runner


def ids_of(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


def test_what_repeats_takes_fewer_steps() -> None:
    """30 tokens: one by prefill, then five in each step, until only four may come."""
    observer = Watcher()
    [events], runner = run(([*PROMPT, 10, 11], GREEDY), observer=observer)
    assert ids_of(events) == [10 + n % 6 for n in range(2, 32)]
    assert runner.calls == [("prefill", 1), *[("verify", 1)] * 6]
    assert observer.speculations == [(4, 4)] * 5 + [(3, 3)]
    decodes = [step for step in observer.steps if step.phase == "decode"]
    assert [step.num_tokens for step in decodes] == [5] * 5 + [4]
    assert [step.num_sequences for step in decodes] == [1] * 6
    assert observer.num_gaps == 29


def test_without_anything_to_guess_from_it_decodes() -> None:
    [_], runner = run(([1], replace(GREEDY, max_tokens=9)), next_token=lambda ids: ids[-1] + 1)
    assert runner.calls == [("prefill", 1), *[("decode", 1)] * 8]


STOP = frozenset({14})
REQUESTS = [
    GREEDY,
    replace(GREEDY, max_tokens=1),
    replace(GREEDY, max_tokens=2),
    *(replace(GREEDY, max_tokens=n) for n in range(3, 12)),
    replace(GREEDY, stop_token_ids=STOP),
    replace(GREEDY, stop_token_ids=STOP, min_tokens=7),
    replace(GREEDY, stop_token_ids=STOP, min_tokens=20, num_logprobs=2),
    replace(GREEDY, frequency_penalty=30.0),
    replace(GREEDY, logit_bias={40: 99.5}, presence_penalty=2.0),
    replace(GREEDY, num_prompt_logprobs=1, num_logprobs=3),
    replace(GREEDY, grammar="5 3 9 0"),
    replace(GREEDY, grammar="1 3 17 0", num_logprobs=0),
    *(SamplingParams(max_tokens=25, seed=n) for n in range(6)),
    *(SamplingParams(max_tokens=25, seed=n, top_p=0.8, repetition_penalty=1.2) for n in range(3)),
    *(SamplingParams(max_tokens=25, seed=n, grammar="2 9 30 0") for n in range(3)),
    *(SamplingParams(max_tokens=25, seed=n, stop_token_ids=STOP, min_tokens=5) for n in range(3)),
]


@pytest.mark.parametrize("peak", [4.0, 7.0, 100.0])
@pytest.mark.parametrize("num_pages", [64, 128, 512])
def test_the_answers_are_those_without(peak: float, num_pages: int) -> None:
    """Their log-probabilities and ends too, alone and in company."""
    requests = [(PROMPT * 3, params) for params in REQUESTS]
    off = replace(ON, speculative_tokens=0)
    expected, plain = run(*requests, config=off, peak=peak)
    limits = replace(LIMITS, num_pages=num_pages)
    answers, runner = run(
        *requests, peak=peak, limits=limits, config=replace(ON, prefix_sharing=False)
    )
    for events, wanted in zip(answers, expected, strict=True):
        assert [*events[:-1], uncached(events[-1])] == [*wanted[:-1], uncached(wanted[-1])]
    assert len(runner.calls) < len(plain.calls) or num_pages == 64  # preemptions take steps
    for request, wanted in zip(requests, expected, strict=True):
        [alone], _ = run(request, peak=peak)
        assert alone[:-1] == wanted[:-1]


def uncached(event: Event) -> Event:
    assert isinstance(event, FinishEvent)
    return replace(event, num_cached_tokens=0)


def test_the_tokens_that_go_in_by_decode_are_those_without() -> None:
    """n generated ones add n - 1, also where the last one was guessed."""
    for params in REQUESTS:
        observer = Watcher()
        [events], _ = run((PROMPT * 3, params), observer=observer)
        decoded = sum(step.num_tokens for step in observer.steps if step.phase == "decode")
        assert decoded == len(ids_of(events)) - 1 == observer.num_gaps


def test_what_was_guessed_in_vain_leaves_the_cache() -> None:
    """What is kept of a sequence is what it says, and can be shared."""
    params = replace(GREEDY, stop_token_ids=frozenset({12}))
    [first], runner = run(([*PROMPT, 10], replace(params, max_tokens=40)))
    assert ids_of(first) == [11, 12]
    assert list(runner.tokens.values()) == [[*PROMPT, 10, 11]]


def test_pages_bound_the_guesses() -> None:
    """One sequence, and no page more than its context takes."""
    limits = replace(LIMITS, num_pages=10, page_size=4, max_context=40)
    [events], _ = run((PROMPT * 2, replace(GREEDY, max_tokens=28)), limits=limits)
    assert ids_of(events) == [10 + n % 6 for n in range(28)]


def test_steps_bound_the_guesses() -> None:
    limits = replace(LIMITS, max_step_tokens=8, max_batch=8)
    observer = Watcher()
    requests = [(PROMPT * 2, replace(GREEDY, max_tokens=12))] * 3
    config = replace(ON, prefix_sharing=False)
    answers, _ = run(*requests, limits=limits, observer=observer, config=config)
    assert [ids_of(events) for events in answers] == [[10 + n % 6 for n in range(12)]] * 3
    decodes = [step for step in observer.steps if step.phase == "decode"]
    assert max(step.num_tokens for step in decodes) <= 8


def test_cancelled_between_the_tokens_of_a_step() -> None:
    """It gets the step's tokens and then its end."""
    line = [10 + n % 6 for n in range(200)]
    paced = Paced(line)
    engine = Engine(FakeRunner(LIMITS, paced), ON)
    engine.start()

    async def main() -> None:
        stream = engine.submit(line[:8], replace(GREEDY, max_tokens=100))
        paced.step(6)  # the prefill's, and five of the first guess
        events = [await anext(stream) for _ in range(6)]
        stream.cancel()
        paced.step(5)
        events += [event async for event in stream]
        *tokens, finish = events
        assert isinstance(finish, FinishEvent)
        assert finish.reason == "cancelled"
        assert ids_of(tokens) == line[8 : 8 + len(tokens)]
        assert len(tokens) in (6, 11)  # of the step under way
        assert finish.num_generated_tokens == len(tokens)
        await engine.drain(PATIENCE)

    asyncio.run(main())


def test_where_logits_depend_on_the_batch_it_is_off_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = replace(LIMITS, batch_invariant=False)
    with caplog.at_level(logging.WARNING):
        answers, runner = run(*[(PROMPT * 2, GREEDY)] * 3, limits=limits)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "speculative" in caplog.text
    assert {name for name, _ in runner.calls} == {"prefill", "decode"}
    assert [ids_of(events) for events in answers] == [[10 + n % 6 for n in range(30)]] * 3


class Breaks(FakeConstraint):
    """Cannot look ahead, or cannot accept its ninth token."""

    def allowed(self, token_ids: Sequence[int]) -> int:
        if self._modulus == 1 and len(token_ids) > 1:
            raise OSError("no look ahead")
        return super().allowed(token_ids)

    def accept(self, token_id: int) -> None:
        if self._modulus == 2 and self._count == 8:
            raise OSError("no more")
        super().accept(token_id)


def test_a_broken_constraint_in_the_middle_of_a_guess() -> None:
    engine = Engine(FakeRunner(LIMITS, around), ON, constrain=Breaks)
    engine.start()

    async def main() -> list[list[Event]]:
        async def one(params: SamplingParams) -> list[Event]:
            async with asyncio.timeout(PATIENCE):
                return [event async for event in engine.submit(PROMPT * 3, params)]

        kinds = [replace(GREEDY, grammar=f"{n} 50 60 0") for n in (1, 2)]
        answers = await asyncio.gather(*map(one, [*kinds, GREEDY]))
        assert engine.is_alive
        await engine.drain(PATIENCE)
        return answers

    looks, fails, plain = asyncio.run(main())
    assert ids_of(looks) == ids_of(plain) == [10 + n % 6 for n in range(30)]
    assert ids_of(fails) == [10 + n % 6 for n in range(8)]
    finish = fails[-1]
    assert isinstance(finish, FinishEvent)
    assert (finish.reason, finish.num_generated_tokens) == ("error", 8)


def test_tokens_of_one_step_have_no_time_between_them() -> None:
    """The gaps add up to what the sequence took to decode."""

    class Gaps(Watcher):
        def __init__(self) -> None:
            super().__init__()
            self.gaps: list[float] = []

        def on_inter_token(self, seconds: float) -> None:
            self.gaps.append(seconds)

    observer = Gaps()
    run(([*PROMPT, 10, 11], GREEDY), observer=observer)
    assert sum(gap == 0 for gap in observer.gaps) == 5 * 4 + 3
    finish = observer.finishes.get(timeout=PATIENCE)
    assert sum(observer.gaps) <= finish.timings.decode_seconds + 1e-6
