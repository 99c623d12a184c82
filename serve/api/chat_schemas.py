"""The JSON that /v1/chat/completions takes, and its messages, which /tokenize takes, too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from serve.api.schemas import (
    MAX_LOGPROBS,
    Count,
    GenerationFields,
    RequestModel,
    UnsupportedValueError,
    WrongTypeError,
    refused,
)

MAX_MESSAGES = 1024
_NO_TOOLS = "tools are not supported: GPT-2 was not taught to call any"

Nothing = Annotated[list[Any], Field(max_length=0)]
NoTools = Annotated[None, refused(_NO_TOOLS, Nothing)]
NoToolChoice = Annotated[None, refused(_NO_TOOLS, Literal["none", "auto"])]
NoToolCall = Annotated[None, refused(_NO_TOOLS)]
NoAudio = Annotated[None, refused("audio is not supported: GPT-2 reads and writes text alone")]


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


def _as_parts(value: object) -> object:
    """A string as its one part. Says of other kinds of parts why they are none."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise WrongTypeError("expected a string or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedValueError(
                f"parts of type {kind!r} are not supported: GPT-2 reads text alone"
            )
    return value


def _as_role(value: object) -> object:
    if value in ("tool", "function"):
        raise UnsupportedValueError(_NO_TOOLS)
    return value


class Message(RequestModel):
    """`developer` is OpenAI's newer word for `system`.

    An answer may be sent back as it came: what is null in it may stay.
    """

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_as_role)]
    name: str | None = Field(None, description="For the template")
    refusal: Annotated[None, refused("refusals are not supported")] = None
    annotations: Annotated[None, refused("annotations are not supported", Nothing)] = None
    audio: NoAudio = None
    tool_calls: NoTools = None
    function_call: NoToolCall = None
    content: Annotated[  # last, for what else is wrong tells more than that it is null
        list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])
    ]

    def for_template(self) -> dict[str, str]:
        """As templates expect it. Parts are joined by line ends, as in vLLM."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": "\n".join(part.text for part in self.content), **named}


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = Field(None, ge=1)
    max_tokens: Count | None = Field(
        None,
        ge=1,
        description="The older name of max_completion_tokens",
        json_schema_extra={"deprecated": True},
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description="Only where logprobs is true")
    audio: NoAudio = None
    tools: NoTools = None
    tool_choice: NoToolChoice = None
    parallel_tool_calls: bool = Field(True, description="Changes nothing: there are no tools")
    functions: NoTools = None
    function_call: NoToolChoice = None

    @field_validator("max_tokens")
    @classmethod
    def _one_limit(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("max_completion_tokens") not in (None, value):
            raise ValueError("not together with another max_completion_tokens")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise ValueError("allowed only where logprobs is true")
        return value
