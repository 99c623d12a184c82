"""POST /v1/completions, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import closing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api import accounting, openapi, sse
from serve.api.body import read_json
from serve.api.generation import Choice, Generation
from serve.api.prompts import prompt_ids
from serve.api.sampling import sampling_params
from serve.api.schemas import CompletionChoice, CompletionRequest, CompletionResponse
from serve.api.served import ServedModel, ServedModels
from serve.stops import StopChecker


def routes(models: ServedModels) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/completions",
        responses=openapi.answers(CompletionResponse, 400, 404, 429, 503, stream=True),
        openapi_extra=openapi.body(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        """Continue one or several prompts."""
        asked = await read_json(request, CompletionRequest)
        model = models.find(asked.model)
        generation = Generation(await _submit(asked, model), request.receive)
        answer = _Answer(asked, model.digest)
        if not asked.stream:
            with closing(generation):
                await generation.finished()
                return Response(answer.whole(generation), media_type="application/json")
        events = _events(generation, answer)
        return sse.EventStream(await anext(events), events)

    return router


async def _submit(asked: CompletionRequest, model: ServedModel) -> list[Choice]:
    prompts = await prompt_ids(asked.prompt, model.tokenizer)
    eos_token_id = model.tokenizer.eos_token_id
    params = sampling_params(asked, asked.max_tokens, model.vocab_size, eos_token_id)
    streams = model.submit(prompts, params, asked.cache_salt or "")
    return [
        Choice(
            index,
            prompts[index],
            stream,
            model.tokenizer.detokenizer(),
            StopChecker(asked.stop),
            asked.min_tokens,
            asked.return_token_ids,
        )
        for index, stream in enumerate(streams)
    ]


async def _events(generation: Generation, answer: _Answer) -> AsyncGenerator[bytes, None]:
    """The SSE events. The first waits for each choice's first token, so an early error raises."""
    with closing(generation):
        await generation.started()
        while news := await generation.news():
            yield answer.chunks(news, generation)
        yield answer.end(generation)


class _Answer:
    """One request's JSON. What all its chunks have in common is written once."""

    def __init__(self, asked: CompletionRequest, fingerprint: str) -> None:
        self._asked = asked
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": fingerprint,
        }
        self._chunk_head = json.dumps(self._head)[:-1]
        self._usage = ', "usage": null' if asked.include_usage else ""

    def whole(self, generation: Generation) -> bytes:
        choices = generation.choices
        response = CompletionResponse(
            **self._head,
            choices=[self._choice(choice) for choice in choices],
            usage=accounting.usage(choices),
            timings=accounting.timings(choices),
        )
        return response.model_dump_json(exclude_unset=True).encode()

    def _choice(self, choice: Choice) -> CompletionChoice:
        text, token_ids = choice.take()
        asked_for: dict[str, Any] = {}
        if self._asked.return_token_ids:
            asked_for = {"token_ids": token_ids, "prompt_token_ids": choice.prompt_ids}
        return CompletionChoice(
            index=choice.index,
            text=text,
            logprobs=None,
            finish_reason=choice.finish_reason,
            **asked_for,
        )

    def chunks(self, news: list[Choice], generation: Generation) -> bytes:
        """An event for each choice with news; the very last one carries the timings."""
        is_last = generation.is_finished and not self._asked.include_usage
        tails = [self._usage] * len(news)
        if is_last:
            tails[-1] += f', "timings": {self._timings(generation)}'
        return b"".join(map(self._chunk, news, tails))

    def _chunk(self, choice: Choice, tail: str) -> bytes:
        is_first = not choice.is_begun
        text, token_ids = choice.take()
        reason = f'"{choice.finish_reason}"' if choice.result is not None else "null"
        ids = ""
        if self._asked.return_token_ids:
            ids = f', "token_ids": {token_ids}'
            if is_first:
                ids += f', "prompt_token_ids": {list(choice.prompt_ids)}'
        return sse.event(
            f'{self._chunk_head}, "choices": [{{"index": {choice.index}, '
            f'"text": {json.dumps(text)}, "logprobs": null, '
            f'"finish_reason": {reason}{ids}}}]{tail}}}'
        )

    def end(self, generation: Generation) -> bytes:
        """The usage, if it was asked for, and [DONE]."""
        if not self._asked.include_usage:
            return sse.DONE
        usage = accounting.usage(generation.choices).model_dump_json()
        tail = f'"choices": [], "usage": {usage}, "timings": {self._timings(generation)}'
        return sse.event(f"{self._chunk_head}, {tail}}}") + sse.DONE

    def _timings(self, generation: Generation) -> str:
        return accounting.timings(generation.choices).model_dump_json()
