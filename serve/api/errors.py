"""Every error as OpenAI's envelope; the only place that knows which error is which HTTP status."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve.api.schemas import UnsupportedValueError, WrongTypeError
from serve.errors import (
    BodyTooLargeError,
    ConflictError,
    DeadlineError,
    EngineError,
    InvalidKeyError,
    LoadError,
    LocalOnlyError,
    ModelNotFoundError,
    OverloadedError,
    ProfileNotFoundError,
    RequestError,
    ServeError,
)

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 2048
CLIENT_CLOSED_REQUEST = 499  # nginx's number for a client that went away; nobody receives it
_RESTART_SECONDS = 5  # until the next server is there, from a library in the cache


class ErrorDetail(BaseModel):
    """`param` names the field at fault, `code` the kind of error, for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


@dataclass(frozen=True)
class Answer:
    """What to tell the client about an error."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The envelope as JSON (ASCII), at most MAX_BODY_BYTES long: the message is cut to fit."""
        message, param = self.message, self.param and _clip(self.param, 100)
        while True:
            detail = {"message": message, "type": self.type, "param": param, "code": self.code}
            body = json.dumps({"error": detail}).encode()
            if len(body) <= MAX_BODY_BYTES:
                return body
            message = _clip(message, len(message) * 3 // 4)


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def answer(error: BaseException) -> Answer:
    """The answer to any error. One that nobody foresaw is logged here, and not told the client."""
    match error:
        case RequestError():
            return Answer(400, str(error), param=error.param, code=error.code)
        case ProfileNotFoundError():
            return Answer(404, str(error), param="name", code="profile_not_found")
        case ConflictError():
            return Answer(409, str(error), code="conflict")
        case LoadError():
            return Answer(409, str(error), code="load_failed")
        case ModelNotFoundError():
            return Answer(404, str(error), param="model", code="model_not_found")
        case InvalidKeyError():
            ask = {"WWW-Authenticate": "Bearer"}
            return Answer(401, str(error), code="invalid_api_key", headers=ask)
        case LocalOnlyError():
            return Answer(403, str(error), code="local_only")
        case BodyTooLargeError():
            close = {"Connection": "close"}
            return Answer(413, str(error), param="body", code="body_too_large", headers=close)
        case OverloadedError():
            retry = _retry_after(error.retry_after_seconds)
            return Answer(429, str(error), "rate_limit_error", None, "rate_limit_exceeded", retry)
        case DeadlineError():
            return Answer(504, str(error), "timeout_error", "timeout", "deadline_exceeded")
        case EngineError():
            retry = {} if error.reason == "engine_dead" else _retry_after(_RESTART_SECONDS)
            kind, code = "service_unavailable_error", "engine_unavailable"
            return Answer(503, str(error), kind, code=code, headers=retry)
        case RequestValidationError():
            return answer(_first_of(list(error.errors())))
        case HTTPException():
            return _http_answer(error)
        case ClientDisconnect():
            return Answer(CLIENT_CLOSED_REQUEST, "The client closed the connection")
    log.error("unexpected error while answering a request", exc_info=error)
    return Answer(500, "The server failed to answer this request", "server_error", None, "internal")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _http_answer(error: HTTPException) -> Answer:
    """Starlette's own: no such route, no such method."""
    codes = {404: "unknown_url", 405: "method_not_allowed"}
    headers = dict(error.headers or {})
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    return Answer(
        error.status_code, error.detail, code=codes.get(error.status_code), headers=headers
    )


def render(error: BaseException) -> Response:
    found = answer(error)
    return Response(found.body(), found.status, found.headers, "application/json")


def invalid_body(error: ValidationError) -> RequestError:
    """What pydantic found, as one error about one field: the first."""
    return _first_of(error.errors(include_url=False, include_input=False))


_CODES = {
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}


def _first_of(errors: list[Any]) -> RequestError:
    first = errors[0]
    kind, cause = first["type"], first.get("ctx", {}).get("error")
    message = cause if isinstance(cause, ValueError) else first["msg"]  # a validator's own words
    # Positions in a list, and FastAPI's "body" and "path", are no fields.
    names = [
        part for part in first["loc"] if isinstance(part, str) and part not in ("body", "path")
    ]
    param = ".".join(names) if names else "body"
    if kind == "missing":
        message = "required; null is as good as absent"
    if kind == "extra_forbidden":
        return RequestError(f"Unknown field: {param!r}", param, "unknown_parameter")
    if isinstance(cause, UnsupportedValueError):
        return RequestError(f"{param}: {message}", param, "unsupported_parameter")
    is_type = isinstance(cause, WrongTypeError) or kind.endswith("_type")
    code = _CODES.get(kind) or ("invalid_type" if is_type else "invalid_value")
    return RequestError(f"{param}: {message}", param, code)


def install(app: FastAPI) -> None:
    """Make `app` answer its foreseen errors so; the middleware answers the others by `render`."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error.detail = f"{error.detail}: {request.method} {request.url.path}"
        return render(error)

    for kind in (ServeError, RequestValidationError, HTTPException, ClientDisconnect):
        app.add_exception_handler(kind, handle)
