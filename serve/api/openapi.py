"""What /openapi.json says of bodies that the endpoints read themselves, and of errors."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.api.errors import ErrorResponse

_REF = "#/components/schemas/{model}"
_MEANINGS = {
    400: "A field is wrong, the body is not JSON, or the context is too short",
    401: "No key, or a wrong one",
    404: "No such model",
    409: "Not in this state",
    413: "The body is too large",
    429: "Too much at once; Retry-After says when to try again",
    503: "The engine is dead or draining",
    504: "Not answered within its time",
}
# Of every endpoint that reads a body and then asks a model.
ASKED = (400, 401, 404, 413, 429)
# What routes name in their own descriptions, where FastAPI finds no models.
_described: set[tuple[type[BaseModel], Literal["validation", "serialization"]]] = set()


def body(schema: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`."""
    _described.add((schema, "validation"))
    content = {"application/json": {"schema": _reference(schema)}}
    return {"requestBody": {"required": True, "content": content}}


def answers(model: type[Any], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: the model on success, the error envelope for everything else."""
    failures: dict[int | str, dict[str, Any]] = {
        s: {"model": ErrorResponse, "description": _MEANINGS[s]} for s in statuses
    }
    default = {"model": ErrorResponse, "description": "Any other error"}
    return {200: {"model": model, "description": "The answer"}, **failures, "default": default}


def text() -> dict[int | str, dict[str, Any]]:
    """The same for an endpoint that answers with plain text."""
    found = answers(str)
    found[200] = {
        "description": "The answer",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
    return found


def generated(model: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The same for an endpoint that generates `model`, or a stream of `chunk`."""
    _described.add((chunk, "serialization"))
    found = answers(model, *ASKED, 503, 504)
    found[200]["description"] = (
        "The answer; where `stream` is true, server-sent events: the data of each is one such "
        "chunk, that of the last is [DONE]. An event named `error` ends a stream that failed."
    )
    data = {"oneOf": [_reference(chunk), _reference(ErrorResponse)]}
    found[200]["content"] = {"text/event-stream": {"schema": data}}
    return found


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": _REF.format(model=model.__name__)}


class DescribedAPI(FastAPI):
    """A FastAPI whose document has the schemas that its routes name themselves, too."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _, definitions = models_json_schema(
                sorted(_described, key=lambda item: item[0].__name__), ref_template=_REF
            )
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(definitions.get("$defs", {}))
            document["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"}
            }
            document["security"] = [{"key": []}, {}]  # where the server has no keys, none is needed
        return super().openapi()
