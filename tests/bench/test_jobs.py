"""The workload of the peer benchmark: jobs, prompts, and what a time is worth."""

from __future__ import annotations

import pytest

from bench.peers.jobs import Job, Metric, alone, at_once, jobs_of, prompts

pytestmark = pytest.mark.unit


def test_prompts_differ_from_the_first_token_on() -> None:
    job = Job(32, 10, 4)
    made = prompts(job, 50257, 0)
    assert len({prompt[0] for prompt in made}) == 32
    assert {len(prompt) for prompt in made} == {10}
    assert all(0 <= token < 50256 for prompt in made for token in prompt)


def test_prompts_are_the_same_for_every_engine_and_others_in_every_repetition() -> None:
    job = Job(2, 10, 4)
    assert prompts(job, 50257, 3) == prompts(job, 50257, 3)
    assert prompts(job, 50257, 3) != prompts(job, 50257, 4)


def test_one_job_gives_prefill_and_decode() -> None:
    metrics = alone()
    assert [job.name for job in jobs_of(metrics)] == ["1x64+1", "1x322+64", "1x1000+1", "1x900+64"]
    assert all(metric.job.context <= 1024 for metric in metrics)


@pytest.mark.parametrize(
    ("phase", "rate"), [("prefill", 322 / 0.5), ("decode", 63 / 1.5), ("at_once", 8 / 2.0)]
)
def test_the_first_token_belongs_to_the_prefill(phase: str, rate: float) -> None:
    assert Metric("key", "label", Job(8, 322, 64), phase).rate(0.5, 2.0) == rate


def test_at_once() -> None:
    assert [(m.key, m.job.requests) for m in at_once((8, 32))] == [
        ("at_once_8", 8),
        ("at_once_32", 32),
    ]
