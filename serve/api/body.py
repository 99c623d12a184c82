"""Read a request's JSON into a schema. Knows no endpoint."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from serve.api.errors import invalid_body
from serve.api.schemas import RequestModel
from serve.errors import RequestError

Schema = TypeVar("Schema", bound=RequestModel)


async def read_json(request: Request, schema: type[Schema]) -> Schema:
    """The body as `schema`. Raises RequestError, naming the field; ClientDisconnect.

    The content type must say JSON: it is what keeps a web page of another origin from posting here.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"Content-Type is {kind!r}; send application/json", "body", "invalid_content_type"
        )
    try:
        return schema.model_validate_json(await request.body())
    except ValidationError as error:
        raise invalid_body(error) from None
