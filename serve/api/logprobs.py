"""Log-probabilities as OpenAI writes them: in lists for completions, in objects for chat.

Knows no endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.api.choice import ScoredToken
from serve.tokenizer import Tokenizer

_LOWEST = -9999.0  # for a probability of 0, as vLLM has it: JSON knows no infinity


def token_text(token: bytes) -> str:
    """A token's text; of one that is no whole characters, its bytes, such as `bytes:\\xf0\\x9f`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def completion_logprobs(scored: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """The lists of CompletionLogprobs.

    A token's alternatives are the best ones by their text, and itself where it is none of them.
    """
    return {
        "tokens": [token_text(tokenizer.token_bytes(token.token_id)) for token in scored],
        "token_logprobs": [token.logprobs and _finite(token.logprobs.logprob) for token in scored],
        "top_logprobs": [token.logprobs and _by_text(token, tokenizer) for token in scored],
        "text_offset": [token.text_offset for token in scored],
    }


def _by_text(token: ScoredToken, tokenizer: Tokenizer) -> dict[str, float]:
    assert token.logprobs is not None
    itself = (token.token_id, token.logprobs.logprob)
    return {
        token_text(tokenizer.token_bytes(token_id)): _finite(logprob)
        for token_id, logprob in (*token.logprobs.top, itself)
    }


def chat_logprobs(scored: Sequence[ScoredToken], tokenizer: Tokenizer) -> dict[str, Any]:
    """The object of ChatLogprobs."""
    content = [
        {
            **_token(token.token_id, token.logprobs.logprob, tokenizer),
            "top_logprobs": [_token(*top, tokenizer) for top in token.logprobs.top],
        }
        for token in scored
        if token.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def _token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": token_text(data), "logprob": _finite(logprob), "bytes": list(data)}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
