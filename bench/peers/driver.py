"""Measure all engines on one model, interleaved: while one runs, the others are halted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.peers.contestant import Contestant
from bench.peers.engines import REFERENCE
from bench.peers.jobs import Job, Metric, jobs_of, prompts
from bench.peers.report import agreement, ratios

Say = Callable[[str], None]
CHECK_PROMPTS, CHECK_TOKENS = (5, 64, 322), 16  # tokens in, and out
CHECK_SEED, WARM_UP_SEED = -2, -1  # repetitions count from 0


@dataclass(frozen=True)
class Subject:
    """The model that all run. alone, at_once: what is measured, in two phases with fresh workers.

    An engine is loaded for one request of `max_context` tokens, then for as many as come at once.
    """

    name: str
    folder: Path
    vocab_size: int
    max_context: int
    alone: tuple[Metric, ...]
    at_once: tuple[Metric, ...]
    check_prompts: tuple[int, ...] = CHECK_PROMPTS


def measure(
    subject: Subject, contestants: Sequence[Contestant], repetitions: int, cache: Path, say: Say
) -> dict[str, Any]:
    """The model's part of the report. An engine that fails is out, the others go on."""
    for contestant in contestants:
        say(f"{subject.name}: {contestant.name}: preparing")
        contestant.prepare(subject.folder, cache)
        _tell_failure(subject, contestant, say)
    try:
        _load(subject, contestants, "alone", subject.alone, say)
        _check(subject, contestants, say)
        _repeat(subject, contestants, subject.alone, repetitions, say)
        for contestant in contestants:
            contestant.measure_memory()
            contestant.close()
        if subject.at_once:
            _load(subject, contestants, "at_once", subject.at_once, say)
            _repeat(subject, contestants, subject.at_once, repetitions, say)
    finally:
        for contestant in contestants:
            contestant.close()
    metrics = (*subject.alone, *subject.at_once)
    engines = {c.name: c.result(metrics) for c in contestants}
    return {
        "metrics": [_described(metric) for metric in metrics],
        "engines": engines,
        "ratios": ratios(engines),
    }


def _described(metric: Metric) -> dict[str, Any]:
    unit = "requests/s" if metric.phase == "at_once" else "tokens/s"
    return asdict(metric) | {"unit": unit}


def _load(
    subject: Subject,
    contestants: Sequence[Contestant],
    phase: str,
    metrics: Sequence[Metric],
    say: Say,
) -> None:
    requests = max(metric.job.requests for metric in metrics)
    longest = max(metric.job.context for metric in metrics)
    context = subject.max_context if phase == "alone" else longest
    for contestant in contestants:
        if contestant.error is None:
            say(f"{subject.name}: {contestant.name}: loading for {requests} at once")
            contestant.load(phase, requests, context)
            _tell_failure(subject, contestant, say)


def _check(subject: Subject, contestants: Sequence[Contestant], say: Say) -> None:
    """Compare with the reference: what each says to a few prompts. It also warms up."""
    jobs = [Job(1, length, CHECK_TOKENS) for length in subject.check_prompts]
    asked = [prompts(job, subject.vocab_size, CHECK_SEED)[0] for job in jobs]
    answers = {c.name: c.answers(asked, CHECK_TOKENS) for c in contestants}
    reference = answers.get(REFERENCE)
    for contestant in contestants:
        own = answers[contestant.name]
        if own is not None and reference is not None:
            contestant.check = agreement(own, reference) | {
                "reference": REFERENCE,
                "prompt_tokens": list(subject.check_prompts),
            }
            say(f"{subject.name}: {contestant.name}: {contestant.check}")
        _tell_failure(subject, contestant, say)


def _repeat(
    subject: Subject,
    contestants: Sequence[Contestant],
    metrics: Sequence[Metric],
    repetitions: int,
    say: Say,
) -> None:
    """Each job by each engine in turn; the first round, to warm up, is not counted.

    In it, the tokens of requests at once are compared with the reference's.
    """
    for seed in range(WARM_UP_SEED, repetitions):
        for job in jobs_of(metrics):
            asked = prompts(job, subject.vocab_size, seed)
            tokens = {}
            for contestant in contestants:
                done = contestant.run(job, asked)
                if done is None:
                    _tell_failure(subject, contestant, say)
                    continue
                (first, seconds), tokens[contestant.name] = done
                if seed != WARM_UP_SEED:
                    contestant.times.setdefault(job, []).append(done[0])
                what = "warm-up" if seed == WARM_UP_SEED else f"{seed + 1}/{repetitions}"
                times = f"first token {first:.3f} s, last {seconds:.3f} s"
                say(f"{subject.name} {job.name} {what} {contestant.name}: {times}")
            if seed == WARM_UP_SEED and job.requests > 1 and REFERENCE in tokens:
                _compare(job, contestants, tokens)


def _compare(job: Job, contestants: Sequence[Contestant], tokens: dict[str, Any]) -> None:
    """The share of tokens that are the reference's: after a near tie, a text is another one."""
    reference = [token for row in tokens[REFERENCE] for token in row]
    for contestant in contestants:
        if contestant.name in tokens:
            own = [token for row in tokens[contestant.name] for token in row]
            equal = sum(a == b for a, b in zip(own, reference, strict=True))
            shares = contestant.check.setdefault("tokens_equal_at_once", {})
            shares[str(job.requests)] = equal / len(reference)


def _tell_failure(subject: Subject, contestant: Contestant, say: Say) -> None:
    if contestant.error and not contestant.told:
        contestant.told = True
        say(f"{subject.name}: {contestant.name}: {contestant.state}: {contestant.error}")
