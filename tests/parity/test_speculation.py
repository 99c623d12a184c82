"""Speculative decoding on a real library changes no token and no log-probability, to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from serve.engine import Engine, EngineConfig, Event, FinishEvent, NullObserver, SamplingParams
from serve.runtime.runner import TVMRunner

pytestmark = pytest.mark.parity

PATIENCE = 120.0  # seconds
PARAMS = [
    SamplingParams(max_tokens=60, temperature=0, num_logprobs=3),
    SamplingParams(max_tokens=47, temperature=0, num_prompt_logprobs=1),
    SamplingParams(max_tokens=60, temperature=0.3, seed=1, num_logprobs=0),
    SamplingParams(max_tokens=60, temperature=0.5, seed=2, top_p=0.9, repetition_penalty=1.1),
    SamplingParams(max_tokens=60, temperature=0.2, seed=3, top_k=20, presence_penalty=0.5),
]


class Observer(NullObserver):
    def __init__(self) -> None:
        self.num_drafted = self.num_accepted = 0

    def on_speculation(self, num_drafted: int, num_accepted: int) -> None:
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted


def answers(
    runner: TVMRunner, prompts: Sequence[Sequence[int]], speculative_tokens: int
) -> tuple[list[list[Event]], Observer]:
    """Every prompt with every set of parameters, all side by side; without the ends."""
    observer = Observer()
    config = EngineConfig(prefix_sharing=False, speculative_tokens=speculative_tokens)
    engine = Engine(runner, config, observer)
    engine.start()

    async def one(prompt: Sequence[int], params: SamplingParams) -> list[Event]:
        async with asyncio.timeout(PATIENCE):
            *events, finish = [event async for event in engine.submit(prompt, params)]
        assert isinstance(finish, FinishEvent)
        assert finish.reason == "length"
        return events

    async def main() -> list[list[Event]]:
        tasks = [one(prompt, params) for prompt in prompts for params in PARAMS]
        found = await asyncio.gather(*tasks)
        await engine.drain(PATIENCE)
        return found

    return asyncio.run(main()), observer


def test_greedy_and_seeded_answers(runner: TVMRunner, prompt: list[int]) -> None:
    prompts = [prompt[:20] * 3, prompt[:33], prompt[40:47] * 9, prompt[100:101] * 17]
    free = runner.num_free_pages()
    expected, off = answers(runner, prompts, 0)
    assert off.num_drafted == 0
    for speculative_tokens in (1, 5):
        found, on = answers(runner, prompts, speculative_tokens)
        assert found == expected
        assert 0 < on.num_accepted < on.num_drafted
    assert runner.num_free_pages() == free
