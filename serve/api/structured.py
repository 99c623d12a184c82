"""From a request's `response_format`, `regex` or `choice` to the grammar of its text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve.api.schemas import GenerationFields
from serve.errors import RequestError
from serve.grammar import Grammars


async def grammar_of(asked: GenerationFields, grammars: Grammars | None) -> str | None:
    """What the engine holds the text to, if anything. Raises RequestError for what cannot be.

    Compiled beside the event loop, which may take tenths of a second. The engines' process compiles
    it again, and so knows that it can.
    """
    wanted = _wanted(asked)
    if not wanted:
        return None
    field, *others = wanted
    if others:
        raise RequestError(f"{others[0]}: not together with {field}", others[0])
    if grammars is None:
        raise RequestError(
            f"{field}: this model is served without structured output",
            field,
            "unsupported_parameter",
        )
    return await asyncio.to_thread(wanted[field], grammars)


def _wanted(asked: GenerationFields) -> dict[str, Callable[[Grammars], str]]:
    """By field, what makes its grammar."""
    found: dict[str, Callable[[Grammars], str]] = {}
    form, pattern, choices = asked.response_format, asked.regex, asked.choice
    if form is not None and form.json_schema is not None:
        schema = form.json_schema.json_schema
        found["response_format"] = lambda grammars: grammars.json_schema(schema, "response_format")
    elif form is not None and form.type == "json_object":
        found["response_format"] = lambda grammars: grammars.json_object()
    if pattern is not None:
        found["regex"] = lambda grammars: grammars.regex(pattern, "regex")
    if choices is not None:
        found["choice"] = lambda grammars: grammars.choice(choices, "choice")
    return found
