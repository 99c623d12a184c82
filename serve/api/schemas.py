"""The JSON that /v1/completions takes, and what it shares with chat.

Knows no model, so no vocabulary either.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000  # of one stop string
MAX_STOP_TOKENS = 128
MAX_CHOICES = 128  # of one request: prompts times n, or times best_of
MAX_LOGPROBS = 20
MAX_USER_CHARACTERS = 256
_INT64 = 2**63

Prompts = list[str] | list[list[int]]
# JSON's integers have no end; Python cannot even write out very long ones.
Count = Annotated[int, Field(lt=_INT64)]
TokenId = Annotated[int, Field(ge=0, lt=_INT64)]

# For the description of what is read by hand.
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[TokenId], Field(min_length=1)]
_Prompt = (
    _Text
    | Annotated[list[_Text], Field(min_length=1)]
    | _Ids
    | Annotated[list[_Ids], Field(min_length=1)]
)
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Stop = _StopString | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _Bias],
    Field(json_schema_extra={"additionalProperties": False}),
]


class UnsupportedValueError(ValueError):
    """A value that OpenAI's API knows and this server does not serve."""


class WrongTypeError(ValueError):
    """A value of a type that the field cannot have."""


def refused(why: str, harmless: Any = None) -> PlainValidator:
    """For a field that OpenAI's API has and this server does not serve.

    null passes, and so does what is of the type `harmless`, for it asks for nothing.
    """
    passes = TypeAdapter(harmless)

    def refuse(value: object) -> None:
        try:
            passes.validate_python(value)
        except ValidationError:
            raise UnsupportedValueError(why) from None

    kind = None if harmless is None else harmless | None
    return PlainValidator(refuse, json_schema_input_type=kind)


def _is_ids(value: object) -> bool:
    """A bool is no id, nor what is no integer of 64 bits."""
    return isinstance(value, list) and all(
        type(item) is int and -_INT64 <= item < _INT64 for item in value
    )


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
    if value == []:
        raise ValueError("empty; give at least one prompt")
    raise WrongTypeError(
        "expected a string, a list of strings, token ids, or a list of lists of token ids"
    )


def _as_stop_strings(value: object) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise WrongTypeError("expected a string or a list of strings")
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
        if name not in required and {"type": "null"} not in (prop, *prop.get("anyOf", ())):
            about = {key: prop.pop(key) for key in ("default", "description") if key in prop}
            schema["properties"][name] = {"anyOf": [prop, {"type": "null"}], **about}


class RequestModel(BaseModel):
    """Strict: "5" is no number, true no integer, NaN no float. null stands for the default.

    A field that it does not know is an error, null or not, unless the validation says
    `extra="ignore"`.
    """

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
        known = _names(cls)
        return {k: value for k, value in data.items() if value is not None or k not in known}


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


class StreamOptions(RequestModel):
    """include_usage: one more chunk at the end, without choices, carries the usage.

    continuous_usage_stats (vLLM's): every chunk says the usage so far.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(RequestModel):
    """`strict` changes nothing: the answer always matches."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class ResponseFormat(RequestModel):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="For type json_schema, and it alone")

    @model_validator(mode="after")
    def _schema_with_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema goes with type "json_schema", and only with it')
        return self


class GenerationFields(RequestModel):
    """What every generating endpoint takes."""

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="Choices for each prompt")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: Count = Field(0, ge=-1, description="0 or -1: off")
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="1: off")
    logit_bias: Annotated[
        dict[int, _Bias], BeforeValidator(_as_biases, json_schema_input_type=_Biases)
    ] = {}
    seed: int | None = Field(
        None, ge=-_INT64, lt=_INT64, description="A negative seed means itself plus 2**64"
    )
    stop: Annotated[list[str], PlainValidator(_as_stop_strings, json_schema_input_type=_Stop)] = []
    stop_token_ids: list[TokenId] = Field([], max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    min_tokens: Count = Field(0, ge=0)
    truncate_prompt_tokens: Count | None = Field(
        None, ge=1, description="Keep only so many of the prompt's last tokens"
    )
    return_token_ids: bool = False
    response_format: ResponseFormat | None = None
    regex: str | None = Field(None, min_length=1, description="What the whole text must match")
    choice: list[_Text] | None = Field(
        None, min_length=1, description="What the whole text must be one of"
    )
    timeout: float | None = Field(None, gt=0, description="Seconds, the queue included")
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=MAX_USER_CHARACTERS)
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

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Annotated[Prompts, PlainValidator(_as_prompts, json_schema_input_type=_Prompt)]
    echo: bool = Field(False, description="The prompt's text comes first")
    max_tokens: Count = Field(16, ge=0, description="0 only with echo")
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="Choices to generate, of which the n best are told"
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    suffix: Literal[""] = ""

    @field_validator("suffix", mode="before")
    @classmethod
    def _no_infill(cls, value: object) -> object:
        if isinstance(value, str) and value:
            raise UnsupportedValueError("GPT-2 cannot infill: it continues a text, and no more")
        if not isinstance(value, str):
            raise WrongTypeError("expected a string")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _nothing_only_with_echo(cls, value: int, info: ValidationInfo) -> int:
        if value == 0 and not info.data.get("echo"):
            raise ValueError("0 is allowed only with echo")
        return value

    @field_validator("best_of")
    @classmethod
    def _at_least_n(cls, value: int, info: ValidationInfo) -> int:
        number = info.data.get("n", 1)
        if value < number:
            raise ValueError(f"{value} is less than n, {number}")
        if value > number and info.data.get("stream"):
            raise ValueError("over n only where stream is false: what is best shows at the end")
        return value

    @property
    def num_generated(self) -> int:
        """Choices to generate for each prompt."""
        return self.best_of or self.n


class LibraryRequest(RequestModel):
    """backend: the server's default. wait: answer when it is done, not when it has begun."""

    profile: str
    backend: str | None = None
    wait: bool = False
