"""From a request's fields to the engine's SamplingParams, held against the model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from serve.api.schemas import GenerationFields
from serve.engine import SamplingParams
from serve.errors import RequestError

_SMALLEST_TEMPERATURE = 1e-5  # below it only the best token has a chance, and float32 overflows
_SEEDS = 2**64
_SEED_STEP = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, as SplitMix64 steps


def sampling_params(
    fields: GenerationFields,
    max_tokens: int,
    vocab_size: int,
    eos_token_id: int,
    grammar: str | None = None,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Raises RequestError for a token id outside the vocabulary, or min_tokens over max_tokens."""
    _check_ids("logit_bias", fields.logit_bias, vocab_size)
    _check_ids("stop_token_ids", fields.stop_token_ids, vocab_size)
    if fields.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens: {fields.min_tokens} is over max_tokens, {max_tokens}", "min_tokens"
        )
    eos = () if fields.ignore_eos else (eos_token_id,)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=fields.temperature if fields.temperature >= _SMALLEST_TEMPERATURE else 0.0,
        top_k=max(fields.top_k, 0),
        top_p=fields.top_p,
        min_p=fields.min_p,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        repetition_penalty=fields.repetition_penalty,
        logit_bias=fields.logit_bias,
        seed=None if fields.seed is None else fields.seed % _SEEDS,
        stop_token_ids=frozenset((*fields.stop_token_ids, *eos)),
        min_tokens=fields.min_tokens,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        grammar=grammar,
    )


def sampled_again(params: SamplingParams, number: int) -> SamplingParams:
    """Those of a prompt's choice `number`: with a seed of its own, that of choice 0 as it was.

    The others lie far from it, so that neighbouring seeds have no choices in common.
    """
    if params.seed is None or number == 0:
        return params
    return replace(params, seed=(params.seed + number * _SEED_STEP) % _SEEDS)


def _check_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{field}: token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})",
                field,
            )
