"""What /openapi.json says of bodies that the endpoints read themselves, and of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.api.errors import ErrorResponse
from serve.api.schemas import CompletionRequest, RequestModel

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[RequestModel], ...] = (CompletionRequest,)
_MEANINGS = {
    400: "A field is wrong, the body is not JSON, or the context is too short",
    404: "No such model",
    429: "The queue is full; Retry-After says when to try again",
    503: "The engine is dead or draining",
}


def body(schema: type[RequestModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`; `schema` must be one of _BODIES."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def answers(
    model: type[BaseModel], *statuses: int, stream: bool = False
) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the model on success, the error envelope for everything else."""
    success: dict[str, Any] = {"model": model, "description": "The answer"}
    if stream:
        success["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    failures: dict[int | str, dict[str, Any]] = {
        s: {"model": ErrorResponse, "description": _MEANINGS[s]} for s in statuses
    }
    default = {"model": ErrorResponse, "description": "Any other error"}
    return {200: success, **failures, "default": default}


class DescribedAPI(FastAPI):
    """A FastAPI whose document has the schemas of _BODIES, too."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _, definitions = models_json_schema(
                [(schema, "validation") for schema in _BODIES], ref_template=_REF
            )
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions["$defs"])
        return super().openapi()
