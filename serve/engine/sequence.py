"""What a client asks for, the events it gets, and a sequence's state in between."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np

from serve.engine.constraint import Constraint
from serve.engine.drafter import Drafter


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to end. The defaults change nothing.

    Plain sampling at temperature 1.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off; relative to the
    best token's probability. presence/frequency penalties count generated tokens,
    repetition_penalty (1 is off) counts the prompt's too. logit_bias: token id -> added to its
    logit. seed: the same seed, prompt and parameters give the same tokens whatever else runs; None
    draws one. num_logprobs: how many alternatives to report with each token's log-probability;
    None reports nothing. num_prompt_logprobs: the same for the prompt's tokens. grammar: what the
    text must match, as the engine's Constrain takes it. It ends with the end-of-text token,
    whatever the stop tokens are; min_tokens gives way where nothing else may come.

    max_tokens may be 0: then the prompt alone is computed.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: frozenset[int] = (
        frozenset()
    )  # with the end-of-text token, unless the client ignores it
    min_tokens: int = 0  # no stop token before so many
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: str | None = None


FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
EarlyEnd = Literal["stop", "cancelled", "timeout"]  # what a client can end a sequence with


@dataclass(frozen=True)
class Timings:
    """Seconds a finished sequence spent in each phase, by the wall clock."""

    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0  # from leaving the queue to the first token
    decode_seconds: float = 0.0  # from the first token to the last


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities: before temperature, penalties and bias.

    `top`: (token id, log-probability) of the most probable tokens, best first; as many as asked.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptEvent:
    """The prompt's log-probabilities, if they were asked for; before any token.

    One entry for each token of the prompt; the first, which nothing precedes, is None.
    """

    logprobs: tuple[TokenLogprobs | None, ...]


@dataclass(frozen=True)
class TokenEvent:
    """One generated token.

    `is_stop`: it is one of the stop tokens, so its text is not part of the answer. `logprobs`: if
    they were asked for.
    """

    token_id: int
    is_stop: bool = False
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class FinishEvent:
    """The last event of every sequence, exactly one. `error` is set where `reason` is "error"."""

    reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0  # of the prompt, taken over from another sequence's KV cache
    timings: Timings = Timings()
    error: Exception | None = None


Event = PromptEvent | TokenEvent | FinishEvent


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"  # admitted; more than its newest token is not yet in the KV cache
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One sequence's tokens and place in the engine. Only the engine thread writes to it.

    token_ids is the prompt and everything generated; the first `num_computed` of them are in the KV
    cache. prompt_logprobs: those of the prompt's first tokens, as far as they are known; None where
    the client wants none or has them.
    """

    seq_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    share_key: str | None = ""  # KV pages are shared among equal keys only; None never shares
    constraint: Constraint | None = None  # at the end of token_ids
    drafter: Drafter | None = None  # none without speculative decoding
    arrived: float = field(default_factory=time.perf_counter)
    phase: Phase = Phase.WAITING
    num_computed: int = 0
    num_cached: int = 0
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        self.token_ids: list[int] = list(self.prompt_ids)
        self.output_counts: Counter[int] = Counter()
        self.rng = np.random.Generator(np.random.PCG64(self.params.seed))
        wanted = self.params.num_prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wanted else None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not yet in the KV cache."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_to_come(self) -> int:
        """Tokens that may yet be generated."""
        return self.params.max_tokens - self.num_generated

    def append(self, token_id: int) -> None:
        if self.constraint is not None:
            self.constraint.accept(token_id)
        self.token_ids.append(token_id)
        self.output_counts[token_id] += 1

    def finish_reason(self) -> FinishReason | None:
        """Whether the newest token ends the sequence, and why.

        With max_tokens 0 the prompt does.
        """
        if self.newest_is_stop():
            return "stop"
        return "length" if self.num_generated >= self.params.max_tokens else None

    def newest_is_stop(self) -> bool:
        """Whether it is a stop token, or the one that ends a grammar, which always stops."""
        if self.constraint is not None and self.constraint.is_over:
            return True
        enough = self.num_generated > self.params.min_tokens
        return enough and self.token_ids[-1] in self.params.stop_token_ids

    def timings(self, now: float) -> Timings:
        admitted = self.admitted if self.admitted is not None else now
        first = self.first_token if self.first_token is not None else now
        return Timings(admitted - self.arrived, max(0.0, first - admitted), max(0.0, now - first))
