"""Queue a request's sequences, as many for each prompt as it wants: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence

from serve.api.choice import Choice, Wanted
from serve.api.sampling import sampled_again
from serve.api.schemas import MAX_CHOICES
from serve.api.served import ServedModel
from serve.engine import SamplingParams
from serve.errors import RequestError


def submit(
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    num_samples: int,
    wanted: Wanted,
    cache_salt: str | None,
) -> list[Choice]:
    """`num_samples` choices of each prompt, in the prompts' order.

    Raises RequestError if that is too many, and as Engine.submit does.
    """
    number = len(prompts) * num_samples
    if number > MAX_CHOICES:
        raise RequestError(
            f"The request asks for {number} sequences ({len(prompts)} prompts, {num_samples} "
            f"each); at most {MAX_CHOICES}",
            "n" if num_samples > 1 else "prompt",
            "too_many_sequences",
        )
    samples = [sampled_again(params, sample) for sample in range(num_samples)]
    asked = [(prompt, own) for prompt in prompts for own in samples]
    streams = model.submit(asked, cache_salt or "")
    return [
        Choice(
            index,
            prompts[index // num_samples],
            stream,
            model.tokenizer,
            wanted,
            index % num_samples,
        )
        for index, stream in enumerate(streams)
    ]
