"""POST /v1/chat/completions, whole or streamed: a completion behind the model's chat template."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api import openapi, sse
from serve.api.answers import Answer, deadline_of, respond
from serve.api.body import read_json
from serve.api.chat_schemas import ChatRequest, Message
from serve.api.choice import Choice, ScoredToken, Wanted
from serve.api.logprobs import chat_logprobs
from serve.api.prompts import prompt_ids
from serve.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatResponse,
)
from serve.api.sampling import sampling_params
from serve.api.served import ServedModel, ServedModels
from serve.api.structured import grammar_of
from serve.api.submission import submit
from serve.chat_template import Prompt, chat_template
from serve.errors import ContextLengthError, RequestError

DEFAULT_MAX_TOKENS = 512  # or what is left of the context

_PARAMS = {"prompt": "messages", "max_tokens": "max_completion_tokens"}


def routes(models: ServedModels) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        responses=openapi.generated(ChatResponse, ChatChunk),
        openapi_extra=openapi.body(ChatRequest),
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        asked = await read_json(request, ChatRequest)
        deadline = deadline_of(request, asked)
        model, choices = await models.submit(
            asked.model, request.headers, lambda model: _submit(asked, model)
        )
        return await respond(request, choices, deadline, ChatAnswer(asked, model))

    return router


async def rendered(
    messages: Sequence[Message], model: ServedModel, add_generation_prompt: bool = True
) -> Prompt:
    """The messages as the model's template writes them. Raises RequestError if it refuses them.

    Beside the event loop: how long a template takes is its own business.
    """
    return await asyncio.to_thread(
        chat_template(model.chat_template).render,
        [message.for_template() for message in messages],
        model.tokenizer.decode([model.tokenizer.eos_token_id]),
        add_generation_prompt,
    )


async def _submit(asked: ChatRequest, model: ServedModel) -> list[Choice]:
    prompt = await rendered(asked.messages, model)
    keep = asked.truncate_prompt_tokens
    [ids] = await prompt_ids([prompt.text], model.tokenizer, keep, "messages")
    grammar = await grammar_of(asked, model.grammars)
    # Who wants a text of a given form or length wants no end of the turn, either.
    has_own_end = asked.ignore_eos or grammar is not None
    stop = asked.stop if has_own_end else [*prompt.stop, *asked.stop]
    wanted = Wanted(
        stop, asked.min_tokens, token_ids=asked.return_token_ids, logprobs=asked.logprobs
    )
    try:
        params = sampling_params(
            asked,
            _max_tokens(asked, len(ids), model.max_context),
            model.vocab_size,
            model.tokenizer.eos_token_id,
            grammar,
            num_logprobs=asked.top_logprobs if asked.logprobs else None,
        )
        return submit(model, [ids], params, asked.n, wanted, asked.cache_salt)
    except RequestError as error:
        error.param = _PARAMS.get(error.param or "", error.param)
        raise


def _max_tokens(asked: ChatRequest, num_prompt_tokens: int, max_context: int) -> int:
    """Raises ContextLengthError if no token has room behind the prompt."""
    limit = asked.max_completion_tokens or asked.max_tokens
    if limit is not None:
        return limit
    left = max_context - num_prompt_tokens
    if left < 1:
        raise ContextLengthError(num_prompt_tokens, 1, max_context)
    return max(min(left, DEFAULT_MAX_TOKENS), asked.min_tokens)


class ChatAnswer(Answer):
    """As OpenAI's `chat.completion` and `chat.completion.chunk`."""

    def __init__(self, asked: ChatRequest, model: ServedModel) -> None:
        kinds = ("chat.completion", "chat.completion.chunk")
        super().__init__(asked, model, "chatcmpl", kinds)
        self._tells_logprobs = asked.logprobs

    def response(self, choices: Sequence[Choice]) -> ChatResponse:
        return ChatResponse(**self.head, choices=[self._choice(choice) for choice in choices])

    def _choice(self, choice: Choice) -> ChatChoice:
        text, token_ids, scored = choice.take()
        logprobs = None
        if self._tells_logprobs:
            logprobs = ChatLogprobs(**chat_logprobs(scored, self.tokenizer))
        asked_for: dict[str, Any] = {}
        if self.asked.return_token_ids:
            asked_for = {"token_ids": token_ids, "prompt_token_ids": choice.prompt_ids}
        assert choice.finish_reason is not None
        return ChatChoice(
            index=choice.index,
            message=AssistantMessage(role="assistant", content=text, refusal=None),
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
            **asked_for,
        )

    def chunk(self, choice: Choice, usage: str, timings: str) -> bytes:
        """The role, before anything else; the text; and an empty delta for the end."""
        events, is_first = [], not choice.is_begun
        text, token_ids, scored = choice.take()
        if is_first:
            delta = '{"role": "assistant", "content": ""}'
            ids = f', "prompt_token_ids": {list(choice.prompt_ids)}'
            events.append(self._event(choice, delta, ids=ids))
        if text or scored or (token_ids and self.asked.return_token_ids):
            delta, logprobs = f'{{"content": {json.dumps(text)}}}', self._logprobs(scored)
            events.append(self._event(choice, delta, logprobs, ids=f', "token_ids": {token_ids}'))
        if choice.result is not None:
            events.append(self._event(choice, "{}", reason=f'"{choice.finish_reason}"'))
        tails = [usage] * (len(events) - 1) + [usage + timings]
        return b"".join(
            sse.event(f"{event}{tail}}}") for event, tail in zip(events, tails, strict=True)
        )

    def _event(
        self,
        choice: Choice,
        delta: str,
        logprobs: str = "null",
        reason: str = "null",
        ids: str = "",
    ) -> str:
        """A chunk without its end."""
        told_ids = ids if self.asked.return_token_ids else ""
        return (
            f'{self.chunk_head}, "choices": [{{"index": {choice.index}, "delta": {delta}, '
            f'"logprobs": {logprobs}, "finish_reason": {reason}{told_ids}}}]'
        )

    def _logprobs(self, scored: Sequence[ScoredToken]) -> str:
        if not self._tells_logprobs:
            return "null"
        return json.dumps(chat_logprobs(scored, self.tokenizer))
