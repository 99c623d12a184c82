"""What a request costs: its tokens and its time."""

from __future__ import annotations

from collections.abc import Sequence

from serve.api.choice import Choice
from serve.api.responses import PromptTokensDetails, Timings, Usage


def usage(choices: Sequence[Choice]) -> Usage:
    """Tokens so far: each prompt's once, however many choices it has, and what all generated."""
    firsts = [choice for choice in choices if choice.sample == 0]
    num_prompt = sum(len(choice.prompt_ids) for choice in firsts)
    num_generated = sum(choice.num_generated for choice in choices)
    num_cached = sum(c.result.num_cached_tokens for c in firsts if c.result is not None)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_generated,
        total_tokens=num_prompt + num_generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
    )


def timings(choices: Sequence[Choice]) -> Timings:
    """The longest of the finished choices in each phase, and the tokens of all over that time.

    Prefill computes the prompt (what is not cached) and yields the first token; decode the others.
    """
    results = [choice.result for choice in choices if choice.result is not None]
    prefill_seconds = max(result.timings.prefill_seconds for result in results)
    decode_seconds = max(result.timings.decode_seconds for result in results)
    num_prefill = sum(r.num_prompt_tokens - r.num_cached_tokens for r in results)
    num_decode = sum(max(0, r.num_generated_tokens - 1) for r in results)
    return Timings(
        queue_seconds=max(result.timings.queue_seconds for result in results),
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        prefill_tokens_per_second=_rate(num_prefill, prefill_seconds),
        decode_tokens_per_second=_rate(num_decode, decode_seconds),
    )


def _rate(num_tokens: int, seconds: float) -> float:
    return num_tokens / seconds if num_tokens and seconds > 0 else 0.0
