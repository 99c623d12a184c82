"""The JSON of /v1/completions, in and out. Knows no model, so no vocabulary either."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000  # of one stop string
MAX_STOP_TOKENS = 128
_INT64 = 2**63

Prompts = list[str] | list[list[int]]


class UnsupportedValueError(ValueError):
    """A value that OpenAI's API knows and this server does not serve."""


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # a bool is no id


def _as_prompts(value: object) -> Prompts:
    """One or several prompts, always as a list. By hand: a union of lists reports every branch."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_ids(value):
            return [value]
        if all(_is_ids(item) for item in value):
            return value
    raise ValueError(
        "expected a string, a list of strings, token ids, or a list of lists of token ids"
    )


def _as_stop_strings(value: object) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise ValueError("expected a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"expected at most {MAX_STOP_STRINGS} stop strings")
    if not all(1 <= len(item) <= MAX_STOP_CHARACTERS for item in strings):
        raise ValueError(f"expected stop strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return strings


def _as_biases(value: object) -> object:
    """JSON has string keys only; they are token ids in decimal."""
    if not isinstance(value, dict):
        return value
    keys = [str(key) for key in value]
    if not all(re.fullmatch(r"[0-9]{1,9}", key) for key in keys):
        raise ValueError("expected token ids as keys")
    return dict(zip(map(int, keys), value.values(), strict=True))


def _nullable(schema: dict[str, Any]) -> None:
    """Say in the JSON schema what RequestModel does: null stands for the default."""
    required = schema.get("required", ())
    for name, prop in schema.get("properties", {}).items():
        if name not in required and {"type": "null"} not in prop.get("anyOf", ()):
            about = {key: prop.pop(key) for key in ("default", "description") if key in prop}
            schema["properties"][name] = {"anyOf": [prop, {"type": "null"}], **about}


class RequestModel(BaseModel):
    """Strict: "5" is no number, true no integer, NaN no float. null stands for the default."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra=_nullable,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class StreamOptions(RequestModel):
    """include_usage: one more chunk at the end, without choices, carries the usage."""

    include_usage: bool = False


class GenerationFields(RequestModel):
    """What every generating endpoint takes."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="1: off")
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_as_biases)
    ] = {}
    seed: int | None = Field(
        None, ge=-_INT64, lt=_INT64, description="A negative seed means itself plus 2**64"
    )
    stop: Annotated[
        list[str], PlainValidator(_as_stop_strings, json_schema_input_type=str | list[str])
    ] = []
    stop_token_ids: list[int] = Field([], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = Field(
        None, min_length=1, description="Prompts with different salts never share KV pages"
    )

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("allowed only where stream is true")
        return value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Annotated[
        Prompts,
        PlainValidator(
            _as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ]
    max_tokens: int = Field(16, ge=1)
    # Known to OpenAI's clients and not served yet: only the values that change nothing.
    n: int = Field(1, ge=1)
    best_of: int = Field(1, ge=1)
    echo: bool = False
    logprobs: int | None = None
    suffix: str = ""

    @field_validator("n", "best_of", "echo", "logprobs", "suffix")
    @classmethod
    def _not_served(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name and value != cls.model_fields[info.field_name].default:
            raise UnsupportedValueError(f"{value!r} is not supported by this server")
        return value


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
    """Tokens of all choices. A stop token counts, as does one that completes a stop string."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(BaseModel):
    """A field with a default is there only when it was asked for."""

    index: int
    text: str
    logprobs: None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []


class CompletionResponse(BaseModel):
    """The answer, and the form of a stream's chunks: usage and timings come in the last one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = None
