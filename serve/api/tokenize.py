"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import APIRouter
from pydantic import BaseModel, Field, ValidationInfo, field_validator
from starlette.requests import Request

from serve.api import openapi
from serve.api.body import read_json
from serve.api.chat import rendered
from serve.api.chat_schemas import MAX_MESSAGES, Message
from serve.api.prompts import encoded
from serve.api.schemas import RequestModel, TokenId
from serve.api.served import ServedModel, ServedModels
from serve.errors import ModelNotFoundError, RequestError, TokenizerError


class TokenizeRequest(RequestModel):
    """Either a prompt or messages. `model`: by default the default one."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = Field(True, description="Changes nothing: GPT-2 adds none")
    add_generation_prompt: bool = Field(True, description="Of messages: begin the answer")
    return_token_strs: bool = False

    @field_validator("messages")
    @classmethod
    def _not_both(cls, value: list[Message], info: ValidationInfo) -> list[Message]:
        if info.data.get("prompt") is not None:
            raise ValueError("not together with prompt")
        return value


class TokenizeResponse(BaseModel):
    """`token_strs`: as the vocabulary writes them, where a space is Ġ; null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: list[TokenId]


class DetokenizeResponse(BaseModel):
    prompt: str


def routes(models: ServedModels) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/tokenize",
        responses=openapi.answers(TokenizeResponse, *openapi.ASKED),
        openapi_extra=openapi.body(TokenizeRequest),
    )
    async def tokenize(request: Request) -> TokenizeResponse:
        """The token ids of a prompt, or of messages behind the chat template."""
        asked = await read_json(request, TokenizeRequest)
        model = _find(models, asked.model, request.headers)
        tokens = await _tokens(asked, model)
        symbols = [model.tokenizer.symbols(t) for t in tokens] if asked.return_token_strs else None
        return TokenizeResponse(
            count=len(tokens),
            max_model_len=model.max_context,
            tokens=tokens,
            token_strs=symbols,
        )

    @router.post(
        "/detokenize",
        responses=openapi.answers(DetokenizeResponse, *openapi.ASKED),
        openapi_extra=openapi.body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> DetokenizeResponse:
        """The text of token ids."""
        asked = await read_json(request, DetokenizeRequest)
        model = _find(models, asked.model, request.headers)
        try:
            return DetokenizeResponse(prompt=model.tokenizer.decode(asked.tokens))
        except TokenizerError as error:
            raise RequestError(f"tokens: {error}", "tokens") from error

    return router


def _find(models: ServedModels, name: str | None, headers: Mapping[str, str]) -> ServedModel:
    if name is not None:
        return models.find(name, headers)
    if models.default is None:
        raise ModelNotFoundError("", models.names)
    return models.default


async def _tokens(asked: TokenizeRequest, model: ServedModel) -> list[int]:
    if asked.messages is not None:
        prompt = await rendered(asked.messages, model, asked.add_generation_prompt)
        return (await encoded([prompt.text], model.tokenizer, "messages"))[0]
    if asked.prompt is None:
        raise RequestError("prompt: required, or messages", "prompt", "missing_required_parameter")
    return (await encoded([asked.prompt], model.tokenizer))[0]
