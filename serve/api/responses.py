"""The JSON that the generating endpoints answer, as OpenAI has it, and our extras.

A field with a default is there only where it was asked for.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class Timings(BaseModel):
    """By the wall clock; of several choices the longest, and all their tokens over that time."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Every prompt's tokens once, and those of all choices that were generated for it.

    A stop token counts, as does one that completes a stop string.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Response(BaseModel):
    """What all have, chunks too: in a stream, usage and timings come in the last one."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Any]
    usage: Usage | None = None
    timings: Timings | None = None


class CompletionLogprobs(BaseModel):
    """A list entry for each token. The prompt's first token, which nothing precedes, has null.

    `text_offset`: where the token begins, in characters of the choice's text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class CompletionResponse(Response):
    """The answer of /v1/completions, and the form of its stream's chunks."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TopLogprob(BaseModel):
    """`bytes`: the token's exact bytes, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class ChatResponse(Response):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Delta(BaseModel):
    """What a chunk adds: first the role, then text, at the end nothing."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class ChatChunk(Response):
    """One event of a streamed chat completion."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
