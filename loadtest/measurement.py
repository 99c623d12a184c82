"""What one request measured, and the four numbers that follow from it. Knows no HTTP, no Locust."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """Counts as the host's usage gives them, and four moments on one clock, in seconds.

    Built only from a stream that was right from beginning to end, so
    `started_at < first_token_at <= last_token_at <= done_at`.
    """

    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt: served from a prefix cache, never computed
    num_generated_tokens: int
    started_at: float  # just before the request was sent
    first_token_at: float
    last_token_at: float
    done_at: float  # `data: [DONE]`
    num_bytes: int  # of the answer's body

    @property
    def time_to_first_token_ms(self) -> float:
        return (self.first_token_at - self.started_at) * 1000

    @property
    def request_ms(self) -> float:
        return (self.done_at - self.started_at) * 1000

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Computed prompt tokens over time to first token; None if all came from a cache."""
        num_computed = self.num_prompt_tokens - self.num_cached_tokens
        return _rate(num_computed, self.first_token_at - self.started_at)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first over the time they took; None if the first was the only one."""
        return _rate(self.num_generated_tokens - 1, self.last_token_at - self.first_token_at)


def _rate(num_tokens: int, seconds: float) -> float | None:
    """Tokens per second; None where nothing was done or no time passed, as neither has a rate."""
    return num_tokens / seconds if num_tokens > 0 and seconds > 0 else None
