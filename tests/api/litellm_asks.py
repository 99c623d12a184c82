"""Ask a server through litellm and print what it makes of the answers, as JSON.

In a process of its own: litellm leaves an event loop behind, whose warning would hit any later
test, and it looks for prices in the network unless the environment forbids it when it is imported.

    LITELLM_LOCAL_MODEL_COST_MAP=True python -m tests.api.litellm_asks http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from pydantic import BaseModel

MESSAGES = [{"role": "user", "content": "hi"}]


class Answer(BaseModel):
    is_kind: bool


def ask(url: str) -> dict[str, Any]:
    to: dict[str, Any] = {"api_base": url, "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = {**to, "model": "openai/gettysburg", "messages": MESSAGES}
    text = {
        **to,
        "model": "text-completion-openai/gettysburg",
        "prompt": "Four score",
        "max_tokens": 3,
    }
    answer = litellm.completion(**chat, n=2, logprobs=True, top_logprobs=1)
    usage = {"include_usage": True}
    chunks = list(litellm.completion(**chat, stream=True, stream_options=usage))
    structured = litellm.completion(**chat, response_format=Answer)
    return {
        "chat": [choice.message.content for choice in answer.choices],
        "logprobs": [entry.token for entry in answer.choices[0].logprobs.content],
        "chat stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "finish_reason": [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason],
        "total_tokens": [answer.usage.total_tokens, chunks[-1].usage.total_tokens],
        "structured": structured.choices[0].message.content,
        "text": litellm.text_completion(**text).choices[0].text,
        "text stream": "".join(
            chunk.choices[0].text or "" for chunk in litellm.text_completion(**text, stream=True)
        ),
        "unknown model": _error({**chat, "model": "openai/nobody"}),
        "too long": _error({**chat, "max_tokens": 1000}),
        "tools": _error({**chat, "tools": [{"type": "function", "function": {"name": "f"}}]}),
    }


def _error(asked: dict[str, Any]) -> str:
    try:
        litellm.completion(**asked)
    except Exception as error:
        return type(error).__name__
    return "none"


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    print(json.dumps(ask(sys.argv[1])))
