"""A conversation's messages to one prompt, by a Jinja2 template. Knows no model and no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve.errors import ModelError, RequestError

_SHIPPED = "data/chat.jinja"


@dataclass(frozen=True)
class Prompt:
    """`stop`: the strings that the template itself wants the answer to end before."""

    text: str
    stop: tuple[str, ...] = ()


class ChatTemplate:
    """A template, as transformers has them: it sees `messages` (each with `role` and `content`),
    `add_generation_prompt`, `bos_token`, `eos_token` and `raise_exception(message)`.

    Beyond that it may `set stop` to a list of strings, the stop strings of its answers.
    """

    def __init__(self, source: str | None = None) -> None:
        """None: the shipped one. Raises ModelError for what is no template."""
        if source is None:
            source = (resources.files("serve") / _SHIPPED).read_text("utf-8")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(f"the chat template, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        eos_token: str,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """Raises RequestError if the template refuses the messages, or fails."""
        try:
            module = self._template.make_module(
                {
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "bos_token": eos_token,  # as GPT-2 has it
                    "eos_token": eos_token,
                }
            )
        except Exception as error:  # a template may fail in any way that Python can
            raise RequestError(f"messages: the chat template says: {error}", "messages") from error
        stop = getattr(module, "stop", ())
        return Prompt(str(module), (stop,) if isinstance(stop, str) else tuple(stop))


@cache
def chat_template(source: str | None) -> ChatTemplate:
    """Of equal sources always the same one. Raises ModelError for what is no template."""
    return ChatTemplate(source)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
