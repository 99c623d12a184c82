"""From a request's prompts to token ids."""

from __future__ import annotations

import asyncio

from serve.api.schemas import Prompts
from serve.errors import RequestError, TokenizerError
from serve.tokenizer import Tokenizer

_INLINE_CHARACTERS = 8192  # about 5 ms of work; more would hold up every other client


async def prompt_ids(
    prompts: Prompts, tokenizer: Tokenizer, keep: int | None = None, param: str = "prompt"
) -> list[list[int]]:
    """Each prompt's ids, the last `keep` of them if that is given.

    Raises RequestError about `param` for an empty prompt, or one that is not valid Unicode.
    """
    found = await encoded(prompts, tokenizer, param)
    if not all(found):
        raise RequestError(f"{param}: empty; give at least one token", param)
    return found if keep is None else [ids[-keep:] for ids in found]


async def encoded(prompts: Prompts, tokenizer: Tokenizer, param: str = "prompt") -> list[list[int]]:
    """The same, but an empty prompt has no ids. Long texts are encoded beside the event loop."""
    if sum(map(len, prompts)) > _INLINE_CHARACTERS:
        return await asyncio.to_thread(_encode_all, prompts, tokenizer, param)
    return _encode_all(prompts, tokenizer, param)


def _encode_all(prompts: Prompts, tokenizer: Tokenizer, param: str) -> list[list[int]]:
    try:
        return [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    except TokenizerError as error:
        raise RequestError(f"{param}: {error}", param) from error
