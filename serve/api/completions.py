"""POST /v1/completions, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api import openapi, sse
from serve.api.answers import Answer, deadline_of, respond
from serve.api.body import read_json
from serve.api.choice import Choice, ScoredToken, Wanted
from serve.api.logprobs import completion_logprobs
from serve.api.prompts import prompt_ids
from serve.api.responses import CompletionChoice, CompletionLogprobs, CompletionResponse
from serve.api.sampling import sampling_params
from serve.api.schemas import CompletionRequest
from serve.api.served import ServedModel, ServedModels
from serve.api.structured import grammar_of
from serve.api.submission import submit
from serve.errors import RequestError


def routes(models: ServedModels) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/completions",
        responses=openapi.generated(CompletionResponse, CompletionResponse),
        openapi_extra=openapi.body(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        """Continue one or several prompts."""
        asked = await read_json(request, CompletionRequest)
        deadline = deadline_of(request, asked)
        model, choices = await models.submit(
            asked.model, request.headers, lambda model: _submit(asked, model)
        )
        return await respond(request, choices, deadline, CompletionAnswer(asked, model))

    return router


async def _submit(asked: CompletionRequest, model: ServedModel) -> list[Choice]:
    prompts = await prompt_ids(asked.prompt, model.tokenizer, asked.truncate_prompt_tokens)
    ranks = asked.num_generated > asked.n
    params = sampling_params(
        asked,
        asked.max_tokens,
        model.vocab_size,
        model.tokenizer.eos_token_id,
        await grammar_of(asked, model.grammars),
        num_logprobs=0 if ranks and asked.logprobs is None else asked.logprobs,
        num_prompt_logprobs=asked.logprobs if asked.echo else None,
    )
    tells_logprobs = asked.logprobs is not None
    wanted = Wanted(
        asked.stop, asked.min_tokens, asked.echo, asked.return_token_ids, tells_logprobs
    )
    try:
        return submit(model, prompts, params, asked.num_generated, wanted, asked.cache_salt)
    except RequestError as error:
        if error.param == "n" and asked.best_of is not None:
            error.param = "best_of"
        raise


class CompletionAnswer(Answer):
    """As OpenAI's `text_completion`."""

    def __init__(self, asked: CompletionRequest, model: ServedModel) -> None:
        super().__init__(asked, model, "cmpl", ("text_completion", "text_completion"))
        self._num_told, self._num_generated = asked.n, asked.num_generated
        self._tells_logprobs = asked.logprobs is not None

    def response(self, choices: Sequence[Choice]) -> CompletionResponse:
        told = best(choices, self._num_generated, self._num_told)
        return CompletionResponse(
            **self.head, choices=[self._choice(index, choice) for index, choice in enumerate(told)]
        )

    def _choice(self, index: int, choice: Choice) -> CompletionChoice:
        text, token_ids, scored = choice.take()
        logprobs = None
        if self._tells_logprobs:
            logprobs = CompletionLogprobs(**completion_logprobs(scored, self.tokenizer))
        asked_for: dict[str, Any] = {}
        if self.asked.return_token_ids:
            asked_for = {"token_ids": token_ids, "prompt_token_ids": choice.prompt_ids}
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
            **asked_for,
        )

    def chunk(self, choice: Choice, usage: str, timings: str) -> bytes:
        is_first = not choice.is_begun
        text, token_ids, scored = choice.take()
        reason = f'"{choice.finish_reason}"' if choice.result is not None else "null"
        logprobs = self._logprobs(scored) if self._tells_logprobs else "null"
        ids = ""
        if self.asked.return_token_ids:
            ids = f', "token_ids": {token_ids}'
            if is_first:
                ids += f', "prompt_token_ids": {list(choice.prompt_ids)}'
        return sse.event(
            f'{self.chunk_head}, "choices": [{{"index": {choice.index}, '
            f'"text": {json.dumps(text)}, "logprobs": {logprobs}, '
            f'"finish_reason": {reason}{ids}}}]{usage}{timings}}}'
        )

    def _logprobs(self, scored: Sequence[ScoredToken]) -> str:
        return json.dumps(completion_logprobs(scored, self.tokenizer))


def best(choices: Sequence[Choice], num_samples: int, number: int) -> list[Choice]:
    """The `number` best of each prompt's `num_samples`, by the mean of their log-probabilities.

    All of them, if so many are wanted, in the order in which they were asked for.
    """
    if number == num_samples:
        return list(choices)
    told: list[Choice] = []
    for first in range(0, len(choices), num_samples):
        samples = choices[first : first + num_samples]
        told += sorted(samples, key=lambda c: c.mean_logprob, reverse=True)[:number]
    return told
