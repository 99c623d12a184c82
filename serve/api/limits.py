"""How much, how often and how long: what one client may ask for. The settings, and the rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request

from serve.errors import OverloadedError, RequestError

Seconds = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Limits:
    """What the HTTP layer allows, whatever the engine could take.

    max_body_bytes: of one request. requests_per_minute: of one API key or, where there are none, of
    one client address; None: any number. burst: so many at once after a pause.
    default_timeout_seconds: for requests without a `timeout`; None: no end. max_timeout_seconds:
    the longest `timeout`, which then is the default too unless that is given. unknown_fields:
    whether a request with a field that we do not know is refused, or served without it.
    """

    max_body_bytes: int = 2 * 1024 * 1024
    requests_per_minute: int | None = None
    burst: int = 10
    default_timeout_seconds: Seconds | None = None
    max_timeout_seconds: Seconds | None = None
    unknown_fields: Literal["refuse", "ignore"] = "refuse"

    def timeout(self, asked: float | None) -> float | None:
        """Seconds that a request gets which asks for so many; None: no end. Raises RequestError."""
        longest = self.max_timeout_seconds
        if asked is None:
            return self.default_timeout_seconds or longest
        if longest is not None and asked > longest:
            raise RequestError(f"timeout is {asked:g}; at most {longest:g} seconds", "timeout")
        return asked


def of(request: Request) -> Limits:
    """Those of the app that answers the request."""
    limits: Limits = request.app.state.limits
    return limits


class RateLimiter:
    """A token bucket for each client: it holds `burst` requests, and gets one every interval.

    Kept as a single time for each, that at which its bucket is full again: the generic cell rate
    algorithm. A client whose bucket is full need not be remembered.
    """

    _MOST_CLIENTS = 10_000  # remembered; the one that has been away longest is forgotten

    def __init__(
        self, per_minute: int, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute, self._interval, self._burst = per_minute, 60 / per_minute, burst
        self._clock = clock
        self._full_at: dict[str, float] = {}  # by client, the last to come in at the end

    def enter(self, client: str) -> None:
        """Count a request. Raises OverloadedError, which says when the next one may come."""
        now = self._clock()
        full_at = max(now, self._full_at.pop(client, now))
        wait = full_at - now - (self._burst - 1) * self._interval
        self._full_at[client] = full_at if wait > 0 else full_at + self._interval
        if len(self._full_at) > self._MOST_CLIENTS:
            del self._full_at[next(iter(self._full_at))]
        if wait > 0:
            raise OverloadedError(
                f"More than {self._per_minute} requests a minute; try again in {wait:.1f} seconds",
                wait,
                "rate_limit",
            )
