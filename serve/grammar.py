"""Structured output: from a JSON Schema, a regular expression or a list of choices to the tokens
that may come next. The engine's Constraint, by llguidance (docs/adr/0007-structured-output.md).

Knows the tokenizer; knows nothing of the model, the engine's steps or HTTP.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from serve.engine import Row
from serve.errors import RequestError
from serve.grammar_rules import COMBINING, check_regex, make_sound
from serve.tokenizer import Tokenizer

# What a client can make us compile. Deep schemas would overflow llguidance's stack, and
# intersections of many patterns take exponential time, so both are counted beforehand.
MAX_TEXT_BYTES = 32_768  # of a schema as JSON, and of all choices
MAX_REGEX_BYTES = 4_096  # and of all patterns of a schema
MAX_SUBSCHEMAS = 1_000
MAX_PATTERNS = 8  # different ones, in a schema that combines subschemas
_LIMITS = LLParserLimits(  # a compilation takes at most tenths of a second, a mask milliseconds
    initial_lexer_fuel=100_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_items_in_row=10_000,
    max_lexer_states=20_000,  # which are up to 20 MB of each grammar that is kept
    max_grammar_size=100_000,
    verbose_errors=False,
)


Found = TypeVar("Found")
_WORDS = {  # how llguidance's messages begin -> what a client can make of them
    "NoExtension": "no text can match it",
    "lexer error: too many": "it grows too large",
    "lexer precomputation failed": "it is too large",
    "Unable to determine if regex is empty": "it is too large",
    "oneOf constraints are not supported": "oneOf, of which more than one may match at a time",
}


class Grammars:
    """Makes grammars' texts and, from these, constraints. Safe from any thread.

    Every method raises RequestError, with `param`, for what it cannot compile or what would take
    too long. The `max_kept` grammars used last are kept compiled.
    """

    def __init__(self, tokenizer: Tokenizer, max_kept: int = 32) -> None:
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
        own = _checked_copy(given, param)
        make_sound(own, param)
        return self._checked(_from_schema(own, param), param)

    def regex(self, pattern: str, param: str = "guided_regex") -> str:
        """A text that matches from its beginning to its end, in the syntax of Rust's regex."""
        _check_size(pattern, MAX_REGEX_BYTES, "The regular expression", param)
        check_regex(pattern, param)
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
        return GrammarConstraint(self, text, self._eos_token_id)

    def _checked(self, grammar: str, param: str) -> str:
        """The text is llguidance's behind the field whose it is, for errors that come later."""
        text = f"{param} {grammar}"
        self.matcher(text)
        return text

    def matcher(self, text: str) -> LLMatcher:
        """At the beginning; it shares its lexer, which grows with use, with others of this text."""
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text].deep_copy()
        compiled = self._compiled(text)
        with self._lock:
            self._kept[text] = compiled
            if len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
            return compiled.deep_copy()

    def matcher_of_its_own(self, text: str) -> LLMatcher:
        """One that shares with nobody. What is kept of this text is forgotten."""
        with self._lock:
            self._kept.pop(text, None)
        return self._compiled(text)

    def _compiled(self, text: str) -> LLMatcher:
        param, _, grammar = text.partition(" ")
        compiled = LLMatcher(self._tokenizer, grammar, limits=_LIMITS, log_level=0)
        compiled.compute_bitmask()  # finds what takes too long, and what nothing can match
        probe = compiled.deep_copy()  # goes to where there is first a choice
        probe.consume_tokens(probe.compute_ff_tokens())
        probe.compute_bitmask()
        if probe.is_error():
            raise RequestError(_why(probe, "cannot be used"), param)
        return compiled


class GrammarConstraint:
    """One sequence's place in a grammar; see serve.engine's Constraint.

    The methods raise RequestError where the grammar grows beyond its limits.
    """

    def __init__(self, grammars: Grammars, text: str, eos_token_id: int) -> None:
        self._grammars, self._text, self._eos_token_id = grammars, text, eos_token_id
        self._matcher, self._is_own = grammars.matcher(text), False
        self._token_ids: list[int] = []
        self.is_over = False

    def mask(self, row: Row) -> None:
        """`row` may be shorter than the vocabulary, if the model knows fewer tokens."""
        bits = np.frombuffer(self._tried(LLMatcher.compute_bitmask), np.uint8)
        is_forbidden = np.unpackbits(~bits, count=len(row), bitorder="little").view(np.bool_)
        np.copyto(row, -np.inf, where=is_forbidden)

    def accept(self, token_id: int) -> None:
        self._tried(lambda matcher: matcher.consume_token(token_id))
        self._token_ids.append(token_id)
        self.is_over = token_id == self._eos_token_id

    def allowed(self, token_ids: Sequence[int]) -> int:
        if self._matcher.is_stopped():  # the end alone may come, which validate_tokens leaves out
            return int(not self.is_over and list(token_ids[:1]) == [self._eos_token_id])
        return self._tried(lambda matcher: matcher.validate_tokens(list(token_ids)))

    def _tried(self, act: Callable[[LLMatcher], Found]) -> Found:
        """If the lexer is full, then perhaps of others' doing: once more, with one of our own."""
        found = act(self._matcher)
        if self._matcher.is_error() and not self._is_own:
            self._matcher = self._grammars.matcher_of_its_own(self._text)
            self._is_own = True
            self._matcher.consume_tokens(self._token_ids)
            found = act(self._matcher)
        if self._matcher.is_error():
            why = _why(self._matcher, "cannot be followed any further")
            raise RequestError(why, self._text.partition(" ")[0])
        return found


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids | {tokenizer.eos_token_id})
        self._byte_ids = {token[0]: i for i, token in enumerate(self.tokens) if len(token) == 1}
        self._spelled = {i: self._spell(self.tokens[i]) for i in self.special_token_ids}

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of just these bytes, where a special token's text is text like any other."""
        token_ids = self._tokenizer.encode(text.decode("utf-8", "replace"))
        if self._tokenizer.decode_bytes(token_ids) != text:  # with a space in front, perhaps
            return self._spell(text)
        return [part for i in token_ids for part in self._spelled.get(i, (i,))]

    def _spell(self, text: bytes) -> list[int]:
        return [self._byte_ids[byte] for byte in text]


def _from_schema(schema: dict[str, Any], param: str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(
            schema,
            overrides={
                "item_separator": ",",
                "key_separator": ":",
                "whitespace_pattern": r"[ \t\r\n]{0,16}",  # else a small model may never leave it
                "lenient": False,
                "coerce_one_of": False,
                "json_allowed_escapes": 'nrbtf\\"',  # no \\u: a key in two spellings would be two
            },
        )
    except ValueError as error:
        raise RequestError(f"The JSON schema cannot be used: {str(error)[:300]}", param) from None


def _why(matcher: LLMatcher, fails: str) -> str:
    """llguidance's message in a client's words; of one about a pattern the point."""
    error = matcher.get_error().replace("<non-verbose/>", "").strip()
    _, is_about_pattern, found = error.partition("regex parse error:")
    reason = re.search(r"^error: (.*)$", found, re.MULTILINE)
    if is_about_pattern and reason is not None:
        return f"The regular expression {fails}: {reason[1][:300]}"
    known = (ours for theirs, ours in _WORDS.items() if error.startswith(theirs))
    return f"The grammar {fails}: {next(known, error[:300])}"


def _escaped(text: str) -> str:
    """A regular expression for just this."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _checked_copy(schema: dict[str, Any], param: str) -> dict[str, Any]:
    """What does not take too long, as far as can be seen beforehand."""
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        copy: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:  # integers of over 4300 digits, too
        why = str(error).partition(";")[0][:300]
        raise RequestError(f"The JSON schema is not JSON: {why}", param) from None
    _check_size(text, MAX_TEXT_BYTES, "The JSON schema", param)
    nodes = list(_objects(schema))
    if len(nodes) > MAX_SUBSCHEMAS:
        raise RequestError(f"The JSON schema has more than {MAX_SUBSCHEMAS} subschemas", param)
    patterns = [node["pattern"] for node in nodes if isinstance(node.get("pattern"), str)]
    for node in nodes:
        if isinstance(node.get("patternProperties"), dict):
            patterns += node["patternProperties"]
    _check_size("".join(patterns), MAX_REGEX_BYTES, "The text of the JSON schema's patterns", param)
    if len(set(patterns)) > MAX_PATTERNS and any(COMBINING & node.keys() for node in nodes):
        raise RequestError(
            f"The JSON schema combines subschemas and has more than {MAX_PATTERNS} patterns", param
        )
    return copy


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
