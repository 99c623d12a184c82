"""A request's choices while they are generated: events in, text out. Knows no endpoint, no JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serve.engine import Event, FinishEvent, Stream, TokenEvent
from serve.errors import EngineError
from serve.stops import StopChecker
from serve.tokenizer import Detokenizer


class Choice:
    """One sequence on its way to the client.

    `finish_reason` is there once the text is complete; `result`, the engine's last event, may come
    a step later. `num_generated` counts the tokens up to the end of the text.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        stream: Stream,
        detokenizer: Detokenizer,
        stops: StopChecker,
        min_tokens: int = 0,
        tells_ids: bool = False,
    ) -> None:
        """`tells_ids`: a token is news even where it makes no text certain yet."""
        self.index, self.prompt_ids, self.stream = index, prompt_ids, stream
        self.num_generated = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self.result: FinishEvent | None = None
        self.is_begun = False  # something of it was taken
        self._is_told = False  # its end was taken
        self._detokenizer, self._stops, self._min_tokens = detokenizer, stops, min_tokens
        self._tells_ids = tells_ids
        self._text: list[str] = []
        self._ids: list[int] = []

    def accept(self, event: Event) -> None:
        """Raises the error with which the sequence ended, unless its text was complete before."""
        if isinstance(event, FinishEvent):
            self._finish(event)
        elif isinstance(event, TokenEvent) and self.finish_reason is None:
            self._extend(event)

    @property
    def has_news(self) -> bool:
        if self._text or (self._ids and self._tells_ids):
            return True
        return self.result is not None and not self._is_told

    def take(self) -> tuple[str, list[int]]:
        """The text since the last time, and the ids of the tokens since."""
        taken = "".join(self._text), self._ids
        self._text, self._ids = [], []
        self.is_begun, self._is_told = True, self.result is not None
        return taken

    def cancel(self) -> None:
        if self.result is None:
            self.stream.cancel()

    def _extend(self, event: TokenEvent) -> None:
        self._ids.append(event.token_id)
        self.num_generated += 1
        if not event.is_stop:
            self._add(self._detokenizer.push(event.token_id))

    def _add(self, text: str) -> None:
        if self.num_generated > self._min_tokens:  # no stop string before so many, either
            text, is_hit = self._stops.push(text)
            if is_hit:
                self.finish_reason = "stop"
                self.stream.stop(self.num_generated)
        if text:
            self._text.append(text)

    def _finish(self, event: FinishEvent) -> None:
        self.result = event
        if self.finish_reason is not None:
            return
        if event.error is not None:
            raise event.error
        if event.reason not in ("stop", "length"):
            raise EngineError("The server ended this request before it was complete")
        self._add(self._detokenizer.finish())
        if self.finish_reason is None:
            self.finish_reason = event.reason
            self._text.append(self._stops.finish())


class Generation:
    """All choices of one request, generated side by side until they end or the client goes away.

    Close it, whatever happens: that cancels what is still running.
    """

    def __init__(self, choices: Sequence[Choice], receive: Receive) -> None:
        """`receive`: the request's, its body already read. Call it in a running asyncio loop."""
        self.choices = choices
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._readers = [asyncio.create_task(self._read(choice)) for choice in choices]
        self._watcher = asyncio.create_task(self._watch(receive))

    @property
    def is_finished(self) -> bool:
        return all(choice.result is not None for choice in self.choices)

    async def started(self) -> None:
        """Wait for each choice's first event. Raises the first error, ClientDisconnect included."""
        while not all(c.num_generated or c.result is not None for c in self.choices):
            await self._change()

    async def news(self) -> list[Choice]:
        """Wait for the choices that have news, to be taken; none at the end. Raises as `started`.

        What comes while the caller is busy is news together: a slow client gets longer pieces.
        """
        while True:
            news = [choice for choice in self.choices if choice.has_news]
            if news or self.is_finished:
                return news
            await self._change()

    async def finished(self) -> None:
        """Wait for the end of every choice. Raises as `started`."""
        await asyncio.wait(self._readers)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        for choice in self.choices:
            choice.cancel()
        for task in (*self._readers, self._watcher):
            task.cancel()

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed.clear()
        if self._error is not None:
            raise self._error

    async def _read(self, choice: Choice) -> None:
        try:
            async for event in choice.stream:
                choice.accept(event)
                self._changed.set()
        except Exception as error:
            self._fail(error)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientDisconnect())

    def _fail(self, error: Exception) -> None:
        """The first error is the request's; the other choices end with it."""
        if self._error is None:
            self._error = error
            self._changed.set()
            for choice in self.choices:
                choice.cancel()
