"""The Gettysburg workload: which token ids are sent, and the request body that carries them.

Knows the OpenAI fields of a completion; knows nothing of HTTP, Locust or time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
NUM_PROMPT_TOKENS = 322  # <|endoftext|>, the address's 320, a newline
NUM_DECODE_TOKENS = 64


@cache
def gettysburg_ids() -> tuple[int, ...]:
    """The 322 GPT-2 token ids of `<|endoftext|>` + data/gettysburg.txt + a newline."""
    return tuple(json.loads((DATA / "gettysburg_322.json").read_text("utf-8")))


@dataclass(frozen=True)
class Workload:
    """How long a prompt to send, and how many tokens to have generated (both in tokens, >= 1)."""

    num_prompt_tokens: int = NUM_PROMPT_TOKENS
    num_decode_tokens: int = NUM_DECODE_TOKENS

    def __post_init__(self) -> None:
        """Raises ValueError if either length is below 1."""
        for name in ("num_prompt_tokens", "num_decode_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")

    def prompt_ids(self) -> list[int]:
        """The Gettysburg ids, cut to the wanted length or repeated up to it."""
        return list(islice(cycle(gettysburg_ids()), self.num_prompt_tokens))

    def body(self, model: str, cache_salt: str | None = None) -> dict[str, Any]:
        """The JSON body of one greedy, streamed `POST /v1/completions`.

        `cache_salt` keeps the host from sharing this prompt's KV cache with requests of another
        salt; None leaves the field out, for the hosts that would refuse it.
        """
        body: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt_ids(),
            "max_tokens": self.num_decode_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if cache_salt is not None:
            body["cache_salt"] = cache_salt
        return body
