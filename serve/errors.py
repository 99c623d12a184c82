"""Every error a user or an operator can cause, with its data. Knows nothing of HTTP.

`api/errors.py` renders these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


class ServeError(Exception):
    """Base of the project's own errors; `str()` of one is a message fit for a terminal."""


class ConfigError(ServeError):
    """A setting is wrong.

    Says where it was read, which key, which value, and what would be right.
    """

    def __init__(self, source: str, key: str, value: object, expected: str) -> None:
        super().__init__(f"{source}: {key} = {value!r}: expected {expected}")
        self.source, self.key, self.value, self.expected = source, key, value, expected


class ModelError(ServeError):
    """A model's folder or config.json cannot be served."""


class WeightsError(ServeError):
    """A tensor is missing, truncated or mis-shaped."""

    def __init__(self, tensor: str, expected: str, found: str, source: str) -> None:
        super().__init__(f"{source}: tensor {tensor!r}: expected {expected}, found {found}")
        self.tensor, self.expected, self.found, self.source = tensor, expected, found, source


class TokenizerError(ServeError):
    """A tokenizer file is missing or malformed, or a token id is outside the vocabulary."""


class BackendError(ServeError):
    """The backend is unknown, or this machine cannot run it."""


class CompileError(ServeError):
    """The compiler failed, crashed or ran out of time; `log` is what it printed."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}".rstrip())
        self.log = log


class LibraryError(ServeError):
    """A compiled library is damaged, or was built for another model, machine or TVM."""


class LoadError(ServeError):
    """A library could not be loaded into the engines' process: with that process's message."""


class RequestError(ServeError):
    """A request that can never be served as it is; `param` names the field, `code` the kind."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


class ContextLengthError(RequestError):
    """Prompt and completion together exceed what the model or its KV cache can hold (in tokens)."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_context: int) -> None:
        super().__init__(
            f"This model's maximum context length is {max_context} tokens; the request asks for "
            f"{num_prompt_tokens + max_tokens} ({num_prompt_tokens} in the prompt, {max_tokens} "
            "for the completion). Shorten the prompt or lower max_tokens.",
            param="prompt" if num_prompt_tokens >= max_context else "max_tokens",
            code="context_length_exceeded",
        )


class ModelNotFoundError(ServeError):
    """No served model has this name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"The model {name!r} does not exist; served here: {', '.join(known)}")
        self.name, self.known = name, tuple(known)


class ProfileNotFoundError(ServeError):
    """There is no schedule profile of this name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"There is no profile {name!r}; known: {', '.join(known)}")


class ConflictError(ServeError):
    """What an administrator asks for cannot be done in the server's present state."""


class InvalidKeyError(ServeError):
    """The request has no key, or none of those that it needs."""

    reason = "invalid_key"


class LocalOnlyError(ServeError):
    """Administration without admin keys, from somewhere else than this machine."""

    reason = "not_local"


class BodyTooLargeError(ServeError):
    """The request's body is longer than `limits.max_body_bytes`."""

    reason = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The request's body is larger than {max_bytes} bytes")
        self.max_bytes = max_bytes


class OverloadedError(ServeError):
    """Too much at once; `retry_after_seconds` is when trying again makes sense.

    reason: too many sequences queue, too many tokens do, or one client sends too often.
    """

    def __init__(
        self,
        message: str,
        retry_after_seconds: float,
        reason: Literal["queue_full", "queue_tokens", "rate_limit"] = "queue_full",
    ) -> None:
        super().__init__(message)
        self.retry_after_seconds, self.reason = retry_after_seconds, reason


class DeadlineError(ServeError):
    """The request took longer than it may, which is `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request was not answered within its {seconds:g} seconds")
        self.seconds = seconds


class EngineError(ServeError):
    """The engine failed, is draining or is gone; a waiting sequence ends with this.

    reason: why nothing new is taken either; None where another try may do better.
    """

    def __init__(
        self, message: str, reason: Literal["draining", "engine_dead"] | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
