"""All choices of a request, side by side, and what ends them. Knows no endpoint, no JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Literal

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serve.api.choice import Choice
from serve.errors import DeadlineError


class Deadline:
    """The end of a request's time, `seconds` from now on. Make it in a running asyncio loop."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.at = asyncio.get_running_loop().time() + seconds  # on the loop's clock


class Generation:
    """All choices of one request, generated side by side until they end or the client goes away.

    Close it, whatever happens: that cancels what is still running.
    """

    def __init__(
        self, choices: Sequence[Choice], receive: Receive, deadline: Deadline | None = None
    ) -> None:
        """`receive`: the request's, its body already read. Call it in a running asyncio loop."""
        self.choices = choices
        self._changed, self._ended = asyncio.Event(), asyncio.Event()
        self._error: Exception | None = None
        self._readers = [asyncio.create_task(self._read(choice)) for choice in choices]
        self._watcher = asyncio.create_task(self._watch(receive))
        self._timer = None if deadline is None else self._until(deadline)

    @property
    def is_finished(self) -> bool:
        return all(choice.result is not None for choice in self.choices)

    async def started(self) -> None:
        """Wait for each choice's first token. Raises the first error, ClientDisconnect included."""
        while not all(c.num_generated or c.result is not None for c in self.choices):
            await self._change()

    async def news(self) -> list[Choice]:
        """Wait for the choices that have news, to be taken; none at the end. Raises as `started`.

        What comes while the caller is busy is news together: a slow client gets longer pieces.
        """
        while True:
            if self._error is not None:
                raise self._error
            news = [choice for choice in self.choices if choice.has_news]
            if news or self.is_finished:
                return news
            await self._change()

    async def finished(self) -> None:
        """Wait for the end of every choice. Raises as `started`, at once."""
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        for choice in self.choices:
            choice.cancel()
        for task in (*self._readers, self._watcher):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()

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
            if self.is_finished:
                self._ended.set()
        except Exception as error:
            self._fail(error)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientDisconnect())

    def _until(self, deadline: Deadline) -> asyncio.TimerHandle:
        error = DeadlineError(deadline.seconds)
        return asyncio.get_running_loop().call_at(deadline.at, self._fail, error, "timeout")

    def _fail(
        self, error: Exception, reason: Literal["cancelled", "timeout"] = "cancelled"
    ) -> None:
        """The first error is the request's; the other choices end with it."""
        if self._error is None:
            self._error = error
            self._changed.set()
            self._ended.set()
            for choice in self.choices:
                choice.cancel(reason)
