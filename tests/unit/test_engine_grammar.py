"""Sequences whose text must match a grammar: who may end them, and whom a bad one disturbs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from serve.engine import (
    Constrain,
    Constraint,
    Engine,
    EngineConfig,
    FinishEvent,
    Row,
    SamplingParams,
    TokenEvent,
)
from serve.engine.sampler import choose
from serve.engine.sequence import Sequence as EngineSequence
from serve.errors import EngineError, RequestError
from tests.fakes import FakeConstraint, FakeRunner
from tests.unit.test_engine import GREEDY, PATIENCE, SMALL, Observer, chain

pytestmark = pytest.mark.unit

EOS = 0
PROMPT = [5, 6, 7]


async def answer(
    engine: Engine, params: SamplingParams, prompt: Sequence[int] = PROMPT
) -> tuple[list[TokenEvent], FinishEvent]:
    async with asyncio.timeout(PATIENCE):
        *tokens, finish = [event async for event in engine.submit(prompt, params)]
    assert isinstance(finish, FinishEvent)
    assert finish.num_generated_tokens == len(tokens)
    return [token for token in tokens if isinstance(token, TokenEvent)], finish


def run(
    *params: SamplingParams,
    constrain: Constrain = FakeConstraint,
    runner: FakeRunner | None = None,
    config: EngineConfig | None = None,
    observer: Observer | None = None,
) -> list[tuple[list[TokenEvent], FinishEvent]]:
    """Their answers, side by side."""
    engine = Engine(runner or FakeRunner(SMALL, peak=2.0), config, observer, constrain=constrain)
    engine.start()

    async def main() -> list[tuple[list[TokenEvent], FinishEvent]]:
        answers = await asyncio.gather(*(answer(engine, p) for p in params))
        assert engine.is_alive
        await engine.drain(PATIENCE)
        return answers

    return asyncio.run(main())


def constrained(temperature: float, **others: object) -> SamplingParams:
    params = SamplingParams(
        max_tokens=20, temperature=temperature, seed=3, stop_token_ids=frozenset({EOS})
    )
    return replace(params, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_token_is_one_that_may_come(temperature: float) -> None:
    params = constrained(temperature, grammar=f"7 30 40 {EOS}", logit_bias={1: 100.0})
    [(tokens, finish)] = run(params)
    assert [token.token_id % 7 for token in tokens] == [n % 7 for n in range(20)]
    assert tokens[1].token_id == 1  # bias decides among what may come
    assert finish.reason == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("ignores", [False, True])
def test_at_its_end_the_end_of_text_ends_it_even_if_the_client_ignores_that(
    temperature: float, ignores: bool
) -> None:
    stops = frozenset[int]() if ignores else frozenset({EOS})
    params = constrained(temperature, grammar=f"7 5 5 {EOS}", stop_token_ids=stops)
    [(tokens, finish)] = run(params)
    assert [token.token_id == EOS for token in tokens] == [False] * 5 + [True]
    assert [token.is_stop for token in tokens] == [False] * 5 + [True]
    assert finish.reason == "stop"


def test_min_tokens_bars_the_end_while_anything_else_may_come() -> None:
    params = constrained(0.0, grammar=f"7 2 30 {EOS}", logit_bias={EOS: 100.0})
    (early, _), (late, _), (forced, finish) = run(
        params,
        replace(params, min_tokens=6),
        replace(params, min_tokens=6, grammar=f"7 2 4 {EOS}"),
    )
    assert [len(tokens) for tokens in (early, late, forced)] == [3, 7, 5]
    assert finish.reason == "stop"


def test_nothing_is_drawn_or_changed_for_others() -> None:
    """A grammar that allows everything changes nothing, not even what a seed draws."""
    plain = SamplingParams(max_tokens=12, seed=4, top_p=0.9)
    (free, _), (bound, _) = run(plain, replace(plain, grammar="1 0 99 96", logit_bias={96: -100}))
    (alone, _) = run(replace(plain, logit_bias={96: -100}))[0]
    assert [t.token_id for t in bound] == [t.token_id for t in alone]
    assert len(free) == 12


def test_the_state_outlives_a_preemption() -> None:
    limits = replace(SMALL, num_pages=6, max_context=24)
    params = [constrained(1.0, grammar=f"7 20 20 {EOS}", max_tokens=18, seed=n) for n in range(3)]
    observer, roomy = Observer(), run(*params)
    config = EngineConfig(prefix_sharing=False)
    tight = run(*params, runner=FakeRunner(limits, peak=2.0), config=config, observer=observer)
    assert observer.num_preemptions > 0
    assert [tokens for tokens, _ in tight] == [tokens for tokens, _ in roomy]


class Breaks(FakeConstraint):
    """In its third token, in one way or another."""

    def mask(self, row: Row) -> None:
        if self._how() == 1 and self._count == 2:
            raise OSError("the mask is broken")
        super().mask(row)
        if self._how() == 3 and self._count == 2:
            row[:] = -np.inf

    def accept(self, token_id: int) -> None:
        if self._how() == 2 and self._count == 2:
            raise OSError("it takes no more")
        super().accept(token_id)

    def _how(self) -> int:
        return self._at_least - 50


@pytest.mark.parametrize("how", [1, 2, 3])
def test_one_that_raises_or_allows_nothing_fails_its_own_sequence(how: int) -> None:
    params = constrained(0.0, grammar=f"7 {50 + how} 99 {EOS}")
    (broken, error), (good, _), (plain, _) = run(
        params, replace(params, grammar=f"7 50 99 {EOS}"), GREEDY, constrain=Breaks
    )
    assert (len(broken), error.reason) == (2, "error")
    assert isinstance(error.error, EngineError)
    assert "broken" not in str(error.error)  # internals are for the log
    assert broken == good[:2]
    assert len(good) == 20
    assert [t.token_id for t in plain] == chain(PROMPT, 5)


def test_a_grammar_that_cannot_be_compiled_is_refused_at_the_door() -> None:
    def constrain(text: str) -> Constraint:
        raise RequestError(f"{text} is no grammar", "grammar")

    for maker in (constrain, None):
        engine = Engine(FakeRunner(SMALL), constrain=maker)

        async def main(engine: Engine = engine) -> None:
            with pytest.raises(RequestError) as caught:
                engine.submit(PROMPT, replace(GREEDY, grammar="nonsense"))
            assert caught.value.param == "grammar"
            assert engine.gauges().num_waiting == 0
            await engine.drain(0)

        asyncio.run(main())


def test_the_mask_comes_after_penalties_and_before_top_k() -> None:
    """Of top-k 1 the best that is allowed stays, not the best of all."""
    row = np.array([9, 1, 5, 2, 6, 3], np.float32)
    params = SamplingParams(top_k=1, grammar="3 9 9 0", logit_bias={1: 10.0, 4: 1.0})
    sequence = EngineSequence(0, (1,), params, constraint=FakeConstraint("3 9 9 0"))
    for expected in (3, 1, 2):
        assert choose(row, sequence) == expected
        sequence.append(expected)
    np.testing.assert_array_equal(row, [9, 1, 5, 2, 6, 3])
