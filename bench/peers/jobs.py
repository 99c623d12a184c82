"""What is measured: jobs of so many prompts and tokens, and the prompts. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

Prompts = list[list[int]]


@dataclass(frozen=True)
class Job:
    """`requests` prompts of `prompt_tokens` at once; `new_tokens` are generated for each."""

    requests: int
    prompt_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        return f"{self.requests}x{self.prompt_tokens}+{self.new_tokens}"

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Metric:
    """One figure of a job, higher is better. `phase`: prefill, decode (tokens per second of one
    request) or at_once (requests per second)."""

    key: str
    label: str
    job: Job
    phase: str

    def rate(self, first_seconds: float, seconds: float) -> float:
        """From the times of the first token and of the last.

        The first token comes out of the prefill, so decoding is `new_tokens` - 1 steps.
        """
        if self.phase == "prefill":
            return self.job.prompt_tokens / first_seconds
        if self.phase == "decode":
            return (self.job.new_tokens - 1) / (seconds - first_seconds)
        return self.job.requests / seconds


PROMPT_TOKENS, NEW_TOKENS = 322, 64  # the Gettysburg workload


def alone() -> tuple[Metric, ...]:
    """One request at a time: prefill at three lengths, decode at two."""
    workload, long = Job(1, PROMPT_TOKENS, NEW_TOKENS), Job(1, 900, NEW_TOKENS)
    return (
        Metric("prefill_64", "prefill 64", Job(1, 64, 1), "prefill"),
        Metric("prefill_322", "prefill 322", workload, "prefill"),
        Metric("prefill_1000", "prefill 1,000", Job(1, 1000, 1), "prefill"),
        Metric("decode_322", "decode at 322", workload, "decode"),
        Metric("decode_900", "decode at 900", long, "decode"),
    )


def at_once(batches: Sequence[int]) -> tuple[Metric, ...]:
    """So many requests at once, nothing shared between them."""
    return tuple(
        Metric(f"at_once_{n}", f"{n} at once", Job(n, PROMPT_TOKENS, NEW_TOKENS), "at_once")
        for n in batches
    )


def jobs_of(metrics: Sequence[Metric]) -> list[Job]:
    """Each job once, in order: one run of it gives all of its metrics."""
    return list(dict.fromkeys(metric.job for metric in metrics))


def prompts(job: Job, vocab_size: int, seed: int) -> Prompts:
    """Random token ids, (requests, prompt_tokens); the first tokens all differ.

    So no engine finds a prefix that it knows: not in this job, nor, with another seed, from the
    last one but by chance. The last id of the vocabulary, which ends a text, is left out.
    """
    rng = random.Random(f"{seed}:{job.name}")
    firsts = rng.sample(range(vocab_size - 1), job.requests)
    return [
        [first, *(rng.randrange(vocab_size - 1) for _ in range(job.prompt_tokens - 1))]
        for first in firsts
    ]
