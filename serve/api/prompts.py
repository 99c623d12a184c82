"""From a request's prompts to token ids."""

from __future__ import annotations

import asyncio

from serve.api.schemas import Prompts
from serve.errors import RequestError, TokenizerError
from serve.tokenizer import Tokenizer

_INLINE_CHARACTERS = 8192  # about 5 ms of work; more would hold up every other client


async def prompt_ids(prompts: Prompts, tokenizer: Tokenizer) -> list[list[int]]:
    """Each prompt's ids. Raises RequestError for an empty one, or one that is not valid Unicode."""
    if sum(map(len, prompts)) > _INLINE_CHARACTERS:
        encoded = await asyncio.to_thread(_encode_all, prompts, tokenizer)
    else:
        encoded = _encode_all(prompts, tokenizer)
    if not all(encoded):
        raise RequestError("prompt: empty; give at least one token", "prompt")
    return encoded


def _encode_all(prompts: Prompts, tokenizer: Tokenizer) -> list[list[int]]:
    try:
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    except TokenizerError as error:
        raise RequestError(f"prompt: {error}", "prompt") from error
