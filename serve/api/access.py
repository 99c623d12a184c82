"""What is known of a request, and the one line that the log gets of it. No text, and no key."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from serve.api.errors import CLIENT_CLOSED_REQUEST

log = logging.getLogger("serve.access")

_LONGEST_USER = 64  # characters of it that are logged


@dataclass
class Access:
    """Filled in as it becomes known. `key`: the fingerprint of the API key.

    `user`: on whose behalf the client says it asks.
    """

    request_id: str
    status: int = CLIENT_CLOSED_REQUEST
    is_started: bool = False
    key: str | None = None
    user: str | None = None
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None

    def write(self, method: str, route: str, seconds: float) -> None:
        """The log's line; `seconds` from the request's head to the end of its answer."""
        if log.isEnabledFor(logging.INFO):
            known: dict[str, Any] = {
                "request_id": self.request_id,
                "method": method,
                "route": route,
                "status": self.status,
                "seconds": round(seconds, 6),
                "key": self.key,
                "user": self.user and self.user[:_LONGEST_USER],
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_completion_tokens,
            }
            fields = {name: value for name, value in known.items() if value is not None}
            log.info("request", extra={"fields": fields})


def begin(scope: Scope, request_id: str) -> Access:
    """The one of a new request, which `of` finds."""
    access = Access(request_id)
    scope.setdefault("state", {})["access"] = access
    return access


def of(scope: Scope) -> Access:
    """That of the request with this scope."""
    access: Access = scope["state"]["access"]
    return access
