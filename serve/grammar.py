"""Structured output: from a JSON Schema, a regular expression or a list of choices to the tokens
that may come next. The engine's Constraint, by llguidance (docs/adr/0007-structured-output.md).

Knows the tokenizer; knows nothing of the model, the engine's steps or HTTP.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from serve.engine import Row
from serve.errors import RequestError
from serve.tokenizer import Tokenizer

# What a client can make us compile. Deep schemas would overflow llguidance's stack, and
# intersections of many patterns take exponential time, so both are counted beforehand.
MAX_TEXT_BYTES = 32_768  # of a schema as JSON, and of all choices
MAX_REGEX_BYTES = 4_096
MAX_SUBSCHEMAS = 1_000
MAX_PATTERNS = 8  # different ones, in a schema that combines subschemas
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "patternProperties"}
_LIMITS = LLParserLimits(  # a compilation takes at most tenths of a second, a mask milliseconds
    initial_lexer_fuel=100_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_items_in_row=10_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Grammars:
    """Makes grammars' texts and, from these, constraints. Safe from any thread.

    Every method raises RequestError, with `param`, for what it cannot compile or what would take
    too long. The `max_kept` grammars used last are kept compiled.
    """

    def __init__(self, tokenizer: Tokenizer, max_kept: int = 64) -> None:
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=tokenizer.vocab_size
        )
        self._eos_token_id, self._max_kept = tokenizer.eos_token_id, max_kept
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()  # a matcher may be in use by one thread only

    def json_object(self) -> str:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any], param: str = "response_format") -> str:
        """A JSON value that the schema allows, whole when it ends; no other text around it."""
        given = {key: value for key, value in schema.items() if key != "x-guidance"}
        _check_schema(given, param)
        return self._checked(_from_schema(given), param)

    def regex(self, pattern: str, param: str = "guided_regex") -> str:
        """A text that matches from its beginning to its end, in the syntax of Rust's regex."""
        _check_size(pattern, MAX_REGEX_BYTES, "The regular expression", param)
        return self._checked(LLMatcher.grammar_from_regex(pattern), param)

    def choice(self, choices: Sequence[str], param: str = "guided_choice") -> str:
        """One of these texts, none of them empty."""
        if not all(choices) or not choices:
            raise RequestError("Give at least one choice, and none that is empty", param)
        _check_size("".join(choices), MAX_TEXT_BYTES, "The list of choices", param)
        pattern = "|".join(map(_escaped, choices))
        return self._checked(LLMatcher.grammar_from_regex(pattern), param)

    def constrain(self, text: str) -> GrammarConstraint:
        """A constraint at the beginning of what one of the methods above has returned."""
        return GrammarConstraint(self._matcher(text, "grammar"), self._eos_token_id)

    def _checked(self, text: str, param: str) -> str:
        self._matcher(text, param)
        return text

    def _matcher(self, text: str, param: str) -> LLMatcher:
        """A fresh copy of the compiled grammar."""
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text].deep_copy()
        compiled = LLMatcher(self._tokenizer, text, limits=_LIMITS, log_level=0)
        compiled.compute_bitmask()  # finds what takes too long, and what nothing can match
        if compiled.is_error():
            raise RequestError(_why(compiled.get_error()), param)
        with self._lock:
            self._kept[text] = compiled
            if len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
            return compiled.deep_copy()


class GrammarConstraint:
    """One sequence's place in a grammar; see serve.engine's Constraint.

    The methods raise RequestError where the grammar grows beyond its limits.
    """

    def __init__(self, matcher: LLMatcher, eos_token_id: int) -> None:
        self._matcher, self._eos_token_id = matcher, eos_token_id
        self.is_over = False

    def mask(self, row: Row) -> None:
        """`row` may be shorter than the vocabulary, if the model knows fewer tokens."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        is_forbidden = np.unpackbits(~bits, count=len(row), bitorder="little").view(np.bool_)
        np.copyto(row, -np.inf, where=is_forbidden)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()
        self.is_over = token_id == self._eos_token_id

    def allowed(self, token_ids: Sequence[int]) -> int:
        if self._matcher.is_stopped():  # the end alone may come, which validate_tokens leaves out
            return int(not self.is_over and list(token_ids[:1]) == [self._eos_token_id])
        return self._matcher.validate_tokens(list(token_ids))

    def _check(self) -> None:
        if self._matcher.is_error():
            found = self._matcher.get_error().strip()
            raise RequestError(f"The grammar cannot be followed any further: {found}", "grammar")


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | {tokenizer.eos_token_id})

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))


def _from_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(
        schema,
        overrides={
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_pattern": r"[ \t\r\n]{0,16}",  # else a small model may never leave it
            "lenient": False,
            "coerce_one_of": False,
        },
    )


def _why(error: str) -> str:
    """llguidance's message; of one about a pattern the point, without the grammar around it."""
    _, is_about_pattern, found = error.partition("regex parse error:")
    reason = re.search(r"^error: (.*)$", found, re.MULTILINE)
    if is_about_pattern and reason is not None:
        return f"The regular expression cannot be used: {reason[1]}"
    return f"The grammar cannot be used: {error.strip()[:300]}"


def _escaped(text: str) -> str:
    """A regular expression for just this."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _check_schema(schema: dict[str, Any], param: str) -> None:
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The JSON schema is not JSON: {error}", param) from None
    _check_size(text, MAX_TEXT_BYTES, "The JSON schema", param)
    nodes = list(_objects(schema))
    if len(nodes) > MAX_SUBSCHEMAS:
        raise RequestError(f"The JSON schema has more than {MAX_SUBSCHEMAS} subschemas", param)
    patterns = {node["pattern"] for node in nodes if isinstance(node.get("pattern"), str)}
    for node in nodes:
        if isinstance(node.get("patternProperties"), dict):
            patterns.update(node["patternProperties"])
    if len(patterns) > MAX_PATTERNS and any(_COMBINING & node.keys() for node in nodes):
        raise RequestError(
            f"The JSON schema combines subschemas and has more than {MAX_PATTERNS} patterns", param
        )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in it, itself included."""
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
            todo.extend(node.values())
        elif isinstance(node, list):
            todo.extend(node)


def _check_size(text: str, max_bytes: int, what: str, param: str) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestError(f"{what} has a lone surrogate, which is no character", param) from None
    if size > max_bytes:
        raise RequestError(f"{what} has {size} bytes; at most {max_bytes} are taken", param)
