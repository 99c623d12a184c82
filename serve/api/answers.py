"""A generation as an HTTP answer, whole or as server-sent events, whatever the endpoint.

Knows no endpoint's JSON.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve.api import access, accounting, limits, sse
from serve.api.choice import Choice
from serve.api.generation import Deadline, Generation
from serve.api.responses import Response as ResponseModel
from serve.api.schemas import GenerationFields
from serve.api.served import ServedModel


class Answer(ABC):
    """One request's JSON. What all its chunks have in common is written once."""

    def __init__(
        self, asked: GenerationFields, model: ServedModel, id_prefix: str, kinds: tuple[str, str]
    ) -> None:
        """`kinds`: the `object` of the whole answer, and of a chunk."""
        self.asked, self.tokenizer = asked, model.tokenizer
        self.head: dict[str, Any] = {
            "id": f"{id_prefix}-{uuid.uuid4().hex}",
            "object": kinds[0],
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": model.digest,
        }
        self.chunk_head = json.dumps({**self.head, "object": kinds[1]})[:-1]

    @abstractmethod
    def response(self, choices: Sequence[Choice]) -> ResponseModel:
        """The whole answer, but for usage and timings. All choices have ended."""

    @abstractmethod
    def chunk(self, choice: Choice, usage: str, timings: str) -> bytes:
        """The events for a choice's news.

        Behind `choices`, `usage` goes into each of them, and `timings` into the last.
        """

    def whole(self, choices: Sequence[Choice]) -> bytes:
        response = self.response(choices)
        response.usage, response.timings = accounting.usage(choices), accounting.timings(choices)
        return response.model_dump_json(exclude_unset=True).encode()

    def chunks(self, news: Sequence[Choice], generation: Generation) -> bytes:
        """The events for each choice with news; the very last one carries the timings."""
        usage = self._usage_so_far(generation)
        timings = [""] * len(news)
        if generation.is_finished and not self.asked.include_usage:
            timings[-1] = f', "timings": {self._timings(generation)}'
        return b"".join(
            [self.chunk(choice, usage, end) for choice, end in zip(news, timings, strict=True)]
        )

    def end(self, generation: Generation) -> bytes:
        """The usage, if it was asked for, and [DONE]."""
        if not self.asked.include_usage:
            return sse.DONE
        tail = f'"choices": [], "usage": {self._usage(generation)}'
        event = f'{self.chunk_head}, {tail}, "timings": {self._timings(generation)}}}'
        return sse.event(event) + sse.DONE

    def _usage_so_far(self, generation: Generation) -> str:
        if self.asked.continuous_usage:
            return f', "usage": {self._usage(generation)}'
        return ', "usage": null' if self.asked.include_usage else ""

    def _usage(self, generation: Generation) -> str:
        return accounting.usage(generation.choices).model_dump_json()

    def _timings(self, generation: Generation) -> str:
        return accounting.timings(generation.choices).model_dump_json()


def deadline_of(request: Request, asked: GenerationFields) -> Deadline | None:
    """Counted from now on. Raises RequestError for more time than a request may have."""
    seconds = limits.of(request).timeout(asked.timeout)
    return None if seconds is None else Deadline(seconds)


async def respond(
    request: Request, choices: Sequence[Choice], deadline: Deadline | None, answer: Answer
) -> Response:
    """Raises the generation's error, unless it comes in the middle of a stream."""
    known, asked = access.of(request.scope), answer.asked
    known.user = asked.user
    generation = Generation(choices, request.receive, deadline)
    events = _events(generation, answer, known)
    if asked.stream:
        return sse.EventStream(await anext(events), events)
    async with aclosing(events):
        return Response(await anext(events), media_type="application/json")


async def _events(
    generation: Generation, answer: Answer, known: access.Access
) -> AsyncGenerator[bytes, None]:
    """The SSE events, or the whole body.

    The first event waits for each choice's first token, so that an early error raises.
    """
    try:
        if not answer.asked.stream:
            await generation.finished()
            yield answer.whole(generation.choices)
            return
        await generation.started()
        while news := await generation.news():
            yield answer.chunks(news, generation)
        yield answer.end(generation)
    finally:
        generation.close()
        usage = accounting.usage(generation.choices)
        known.num_prompt_tokens = usage.prompt_tokens
        known.num_completion_tokens = usage.completion_tokens
