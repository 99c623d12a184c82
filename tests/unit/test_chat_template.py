"""Messages to a prompt: the shipped template, one's own, and what a template may not do."""

from __future__ import annotations

import pytest

from serve.chat_template import ChatTemplate, Prompt, chat_template
from serve.errors import ModelError, RequestError

pytestmark = pytest.mark.unit

END = "<|endoftext|>"
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi "},
    {"role": "assistant", "content": " hello\nyou"},
    {"role": "user", "content": "bye"},
]


def test_the_shipped_one() -> None:
    prompt = ChatTemplate().render(TALK, END)
    assert prompt.text == "System: be kind\nUser: hi\nAssistant: hello\nyou\nUser: bye\nAssistant:"
    assert prompt.stop == ("\nSystem:", "\nUser:", "\nAssistant:")
    assert ChatTemplate().render(TALK[:1], END, False).text == "System: be kind\n"


def test_a_conversation_begins_as_it_did_before() -> None:
    """So that its head is in the KV cache."""
    before = ChatTemplate().render(TALK[:2], END).text
    assert ChatTemplate().render(TALK, END).text.startswith(before)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[1].content }}{{ eos_token }}", Prompt(f"{END}hi {END}")),
        ("{% set stop = ['.', '!'] %}a", Prompt("a", (".", "!"))),
        ("{% set stop = 'end' %}a", Prompt("a", ("end",))),
        ("{% for m in messages %}{% break %}{% endfor %}b", Prompt("b")),
        ("  {% if add_generation_prompt %}\n  c\n  {% endif %}\n", Prompt("  c\n")),
    ],
)
def test_ones_own(source: str, expected: Prompt) -> None:
    assert ChatTemplate(source).render(TALK, END) == expected


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ raise_exception('no system, please') }}", "no system, please"),
        ("{{ messages[0].nothing.deeper }}", "nothing"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages.append(1) }}", "append"),  # the sandbox: messages stay as they are
        ("{{ messages.__class__.__mro__ }}", "__class__"),
    ],
)
def test_a_template_that_fails_is_the_requests_fault(source: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as refused:
        ChatTemplate(source).render(TALK, END)
    assert refused.value.param == "messages"


def test_no_template() -> None:
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("a\n{% if %}")


def test_equal_sources_are_compiled_once() -> None:
    assert chat_template("a") is chat_template("a")
    assert chat_template(None) is chat_template(None) is not chat_template("a")
