"""Sequences that want log-probabilities, their prompt's too, or nothing but their prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from serve.engine import (
    Chunk,
    Engine,
    EngineConfig,
    Event,
    FinishEvent,
    Logits,
    PromptEvent,
    Row,
    SamplingParams,
    TokenEvent,
)
from serve.engine import generate as generate_module
from serve.engine.logprobs import log_probabilities
from serve.errors import ContextLengthError
from tests.fakes import FakeRunner
from tests.unit.test_engine import GREEDY, PATIENCE, SMALL, Observer, chain, running

pytestmark = pytest.mark.unit

PROMPT = list(range(3, 23))
RUNNER = FakeRunner(SMALL, peak=2.0)


async def events(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[Event]:
    async with asyncio.timeout(PATIENCE):
        return [event async for event in engine.submit(prompt, params)]


def row_after(ids: Sequence[int]) -> Row:
    row: Row = RUNNER._logits([ids])[0]
    return row


def prompt_event(prompt: Sequence[int], num_top: int) -> PromptEvent:
    pairs = ((row_after(prompt[:n]), prompt[n]) for n in range(1, len(prompt)))
    return PromptEvent((None, *(log_probabilities(row, i, num_top) for row, i in pairs)))


def num_prefilled(observer: Observer) -> int:
    return sum(step.num_tokens for step in observer.steps if step.phase == "prefill")


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_they_are_those_of_the_models_own_logits(num_top: int) -> None:
    """Not of what temperature, penalties and bias make of them."""
    changed = SamplingParams(
        max_tokens=6,
        temperature=0.5,
        top_k=3,
        frequency_penalty=1.0,
        logit_bias={5: 3.0},
        seed=1,
        num_logprobs=num_top,
    )
    with running(FakeRunner(SMALL, peak=2.0)) as engine:
        *found, _ = asyncio.run(events(engine, PROMPT, changed))
    ids = list(PROMPT)
    for event in found:
        assert isinstance(event, TokenEvent)
        assert event.logprobs == log_probabilities(row_after(ids), event.token_id, num_top)
        ids.append(event.token_id)
    assert len(ids) == len(PROMPT) + 6


@pytest.mark.parametrize("length", [1, 2, 8, 9, 20])
@pytest.mark.parametrize("mixes", [True, False])
def test_a_prompts(length: int, mixes: bool) -> None:
    """In chunks, beside one that decodes and one that prefills, and alone."""
    prompt, params = PROMPT[:length], replace(GREEDY, num_prompt_logprobs=2)

    async def main(engine: Engine) -> None:
        others = [
            asyncio.create_task(events(engine, [7] * n, replace(GREEDY, max_tokens=20)))
            for n in (1, 13)
        ]
        await asyncio.sleep(0)
        first, *tokens, finish = await events(engine, prompt, params)
        assert first == prompt_event(prompt, 2)
        assert tokens == [TokenEvent(i) for i in chain(prompt, 5)]
        assert isinstance(finish, FinishEvent)
        for n, other in zip((1, 13), others, strict=True):
            *tokens, _ = await other
            assert tokens == [TokenEvent(i) for i in chain([7] * n, 20)]

    runner = FakeRunner(replace(SMALL, batch_invariant=mixes), peak=2.0)
    with running(runner, EngineConfig(prefill_chunk_tokens=8)) as engine:
        asyncio.run(main(engine))


def test_such_a_prompt_is_computed_whole_and_shared_afterwards() -> None:
    observer = Observer()
    params = replace(GREEDY, num_prompt_logprobs=0)
    with running(FakeRunner(SMALL, peak=2.0), observer=observer) as engine:
        for _ in range(2):
            first, *_ = asyncio.run(events(engine, PROMPT, params))
            assert first == prompt_event(PROMPT, 0)
        assert num_prefilled(observer) == 2 * len(PROMPT)
        *_, finish = asyncio.run(events(engine, PROMPT, GREEDY))
    assert isinstance(finish, FinishEvent)
    assert finish.num_cached_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("chunk", [4, 64])
def test_preempted_it_is_told_once_and_worked_out_once(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of 4 in the middle of its prompt, else after it."""
    counted = []

    def counting(row: Logits, token_id: int, num_top: int) -> object:
        counted.append(token_id)
        return log_probabilities(row, token_id, num_top)

    monkeypatch.setattr(generate_module, "log_probabilities", counting)
    observer, prompt = Observer(), [50 + n for n in range(24)]
    limits = replace(SMALL, num_pages=10, max_context=40)
    config = EngineConfig(prefill_chunk_tokens=chunk, prefix_sharing=False)

    async def main(engine: Engine) -> None:
        long = replace(GREEDY, max_tokens=28)
        old = asyncio.create_task(events(engine, PROMPT[:11], long))
        await asyncio.sleep(0)
        params = replace(GREEDY, max_tokens=4, num_prompt_logprobs=1)
        first, *tokens, _ = await events(engine, prompt, params)
        assert first == prompt_event(prompt, 1)
        assert tokens == [TokenEvent(i) for i in chain(prompt, 4)]
        await old

    with running(FakeRunner(limits, peak=2.0), config, observer) as engine:
        asyncio.run(main(engine))
    assert observer.num_preemptions == 1
    assert counted == prompt[1:]


@pytest.mark.parametrize("num_prompt_logprobs", [None, 1])
@pytest.mark.parametrize("length", [1, 20, SMALL.max_context])
def test_the_prompt_alone(length: int, num_prompt_logprobs: int | None) -> None:
    prompt = [n % 97 for n in range(length)]
    params = SamplingParams(max_tokens=0, num_prompt_logprobs=num_prompt_logprobs)
    observer, runner = Observer(), FakeRunner(SMALL, peak=2.0)
    with running(runner, EngineConfig(prefill_chunk_tokens=64), observer) as engine:
        *found, finish = asyncio.run(events(engine, prompt, params))
        assert found == ([prompt_event(prompt, 1)] if num_prompt_logprobs else [])
        assert isinstance(finish, FinishEvent)
        assert (finish.reason, finish.num_generated_tokens) == ("length", 0)
        assert finish.num_prompt_tokens == length
        assert finish.timings.decode_seconds == 0
        if length == SMALL.max_context:
            with pytest.raises(ContextLengthError):
                asyncio.run(events(engine, [*prompt, 1], params))
    assert num_prefilled(observer) == length
    assert {step.phase for step in observer.steps} == {"prefill"}
    assert observer.first_tokens == []
    assert observer.finishes.get(timeout=PATIENCE) == finish
    assert observer.finishes.empty()


def test_a_prompt_alone_can_be_shared() -> None:
    with running() as engine:
        asyncio.run(events(engine, PROMPT, SamplingParams(max_tokens=0)))
        *tokens, finish = asyncio.run(events(engine, [*PROMPT, 1], GREEDY))
    assert isinstance(finish, FinishEvent)
    assert finish.num_cached_tokens == len(PROMPT)
    assert tokens == [TokenEvent(i) for i in chain([*PROMPT, 1], 5)]


class BadRow(FakeRunner):
    """One prompt has a row without numbers in its middle."""

    def verify(self, chunks: Sequence[Chunk]) -> Logits:
        logits = super().verify(chunks)
        at = 0
        for chunk in chunks:
            if len(self.tokens[chunk.seq_id]) == len(PROMPT):
                logits[at + 4] = np.nan
            at += len(chunk.token_ids)
        return logits


def test_a_prompt_without_a_distribution_fails_alone() -> None:
    params = replace(GREEDY, num_prompt_logprobs=1)

    async def main(engine: Engine) -> None:
        prompts = [PROMPT, PROMPT[:9]]
        bad, good = await asyncio.gather(*(events(engine, p, params) for p in prompts))
        [finish] = bad
        assert isinstance(finish, FinishEvent)
        assert finish.reason == "error"
        assert good[0] == prompt_event(PROMPT[:9], 1)
        assert len(good) == 7

    with running(BadRow(SMALL, peak=2.0)) as engine:
        asyncio.run(main(engine))
