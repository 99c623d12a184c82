"""The one error of a load test, and the message inside a host's error body."""

from __future__ import annotations

import json
from typing import Any

MAX_MESSAGE_CHARACTERS = 500  # Locust keeps every distinct message


class HostError(Exception):
    """The host did not answer, or not as it should; `str()` of it is what Locust's table shows.

    `status` is the HTTP status if that is what was wrong.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message[:MAX_MESSAGE_CHARACTERS])
        self.status = status


def error_message(body: bytes | str) -> str:
    """What a host's error says: the envelope's `error.message`, or else the body as it came."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    try:
        answer = json.loads(text)
    except ValueError:
        return text.strip() or "(no body)"
    return message_in(answer) or text.strip()


def message_in(answer: Any) -> str | None:
    """The message of `{"error": {"message": ...}}`, of `{"message": ...}` or `{"error": "..."}`."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error", answer)
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None
