"""Grammars over GPT-2's own vocabulary: what they let through, and what is refused in time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers.pre_tokenizers import ByteLevel

from serve.engine import Row, SamplingParams
from serve.engine.generate import generate
from serve.engine.sequence import Sequence
from serve.errors import RequestError
from serve.grammar import (
    MAX_PATTERNS,
    MAX_REGEX_BYTES,
    MAX_SUBSCHEMAS,
    MAX_TEXT_BYTES,
    GrammarConstraint,
    Grammars,
)
from serve.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

TOKENIZER = Tokenizer.bundled()
EOS = TOKENIZER.eos_token_id
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@cache
def grammars() -> Grammars:
    return Grammars(TOKENIZER)


def allowed(constraint: GrammarConstraint) -> set[int]:
    row = np.zeros(TOKENIZER.vocab_size, np.float32)
    constraint.mask(row)
    assert set(np.unique(row)) <= {0.0, -np.inf}
    return {int(i) for i in np.flatnonzero(row == 0)}


def matches(text: str, answer: str) -> bool:
    """Whether the answer can be generated, token by token, and then end."""
    constraint = grammars().constrain(text)
    for token_id in [*TOKENIZER.encode(answer), EOS]:
        is_allowed = token_id in allowed(constraint)
        assert constraint.allowed([token_id]) >= is_allowed
        if not is_allowed:
            return False
        assert not constraint.is_over
        constraint.accept(token_id)
    assert constraint.is_over
    return True


def by_chance(text: str, seed: int, favour: Callable[[Row], None]) -> str:
    """What a model that knows nothing answers under this grammar."""
    chance = np.random.default_rng(seed)
    params = SamplingParams(max_tokens=1000, seed=seed)  # the end ends it without a stop token
    constraint = grammars().constrain(text)
    sequence = Sequence(0, (1,), params, constraint=constraint)
    while (reason := sequence.finish_reason()) is None:
        row = chance.normal(0, 2, TOKENIZER.vocab_size).astype(np.float32)
        favour(row)
        generate(sequence, row[np.newaxis], (), [])
    assert reason == "stop"
    assert sequence.token_ids[-1] == EOS
    return TOKENIZER.decode_bytes(sequence.token_ids[1:-1]).decode("utf-8", "strict")


def closers(row: Row) -> None:
    """Quotes, brackets and the end are likely, or a string would never end."""
    for text in ('"', "}", "]", '":', '",', '"}', "1", "0"):
        row[TOKENIZER.encode(text)[0]] += 12
    row[EOS] += 14


# -- what matches


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("{}", True),
        ('{"a": 1, "b": [true, null, {"c": "é\\n"}]}', True),
        ('{\n  "a": 1\n}', True),
        ("[]", False),
        (" {}", False),
        ('{"a": 1', False),
        ('{"a": 01}', False),
        ("{} and more", False),
        ('{"a":' + " " * 16 + "1}", True),
        ('{"a":' + " " * 17 + "1}", False),
    ],
)
def test_json_object(answer: str, expected: bool) -> None:
    assert matches(grammars().json_object(), answer) is expected


def test_json_schema() -> None:
    text = grammars().json_schema(PERSON)
    for answer, expected in [
        ('{"name": "Ann", "age": 3, "tags": ["a", "ü"]}', True),
        ('{"name":"","age":150,"tags":[]}', True),
        ('{"name": "Ann", "age": 151, "tags": []}', False),
        ('{"name": "Ann", "age": -1, "tags": []}', False),
        ('{"name": "Ann", "age": 3, "tags": ["c"]}', False),
        ('{"name": "Ann", "age": 3, "tags": [], "x": 1}', False),
        ('{"name": "Ann", "age": 3}', False),
        ('{"name": "Ann Ann Ann Ann", "age": 3, "tags": []}', False),
    ]:
        assert matches(text, answer) is expected, answer


def test_a_schema_cannot_make_the_text_something_else_than_json() -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    given = schema | {"x-guidance": {"item_separator": ";", "whitespace_pattern": "x*"}}
    assert grammars().json_schema(given) == grammars().json_schema(schema)


def test_regex_and_choice_match_the_whole_text() -> None:
    text = grammars().regex(r"[a-z]+@[a-z]+\.(com|org)")
    assert matches(text, "ann@example.org")
    assert not matches(text, "ann@example.net")
    assert not matches(text, "ann@example.orgs")
    text = grammars().choice(["yes", "yes, but", "a.b*(", "no\n", "für 日本"])
    for answer in ("yes", "yes, but", "a.b*(", "no\n", "für 日本"):
        assert matches(text, answer)
    for answer in ("axb*(", "no", "", "yes,", "fur"):
        assert not matches(text, answer)


def test_at_the_end_of_the_grammar_only_the_end_of_text_may_come() -> None:
    constraint = grammars().constrain(grammars().choice(["yes"]))
    assert EOS not in allowed(constraint)
    constraint.accept(TOKENIZER.encode("yes")[0])
    assert allowed(constraint) == {EOS}


def test_a_byte_of_a_character_is_allowed_where_the_character_is() -> None:
    """日 has three bytes; GPT-2 has tokens for single bytes, which are no text."""
    constraint = grammars().constrain(grammars().regex("[一-龠]"))
    for byte in "日".encode():
        [token_id] = [i for i in allowed(constraint) if TOKENIZER.token_bytes(i) == bytes([byte])]
        constraint.accept(token_id)
    assert allowed(constraint) == {EOS}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_generated_to_its_end_is_json_of_the_schema(seed: int) -> None:
    found = json.loads(by_chance(grammars().json_schema(PERSON), seed, closers))
    assert found.keys() == {"name", "age", "tags"}
    assert len(found["name"]) <= 12
    assert 0 <= found["age"] <= 150
    assert set(found["tags"]) <= {"a", "b", "ü"}
    anything = json.loads(by_chance(grammars().json_object(), seed, closers))
    assert isinstance(anything, dict)


def test_a_model_with_fewer_tokens_than_the_tokenizer() -> None:
    constraint = grammars().constrain(grammars().regex("[a-z]+"))
    for size in (1000, 1001, TOKENIZER.vocab_size):
        row = np.zeros(size, np.float32)
        constraint.mask(row)
        found = {int(i) for i in np.flatnonzero(row == 0)}
        assert found == {i for i in allowed(constraint) if i < size}
        assert found >= {TOKENIZER.encode(c)[0] for c in "abc"}


def test_a_special_tokens_text_is_text() -> None:
    end = TOKENIZER.decode([EOS])
    texts = {
        end: grammars().choice([end]),
        f"a{end}b{end}": grammars().choice([f"a{end}b{end}"]),
        f"ab{end}": grammars().regex(r"ab<\|endoftext\|>"),
        f'"{end}"': grammars().json_schema({"enum": [end]}),
    }
    for expected, text in texts.items():
        assert by_chance(text, 0, closers) == expected


def test_a_tokenizer_that_puts_a_space_in_front() -> None:
    tokenizer = Tokenizer.bundled()
    tokenizer._backend.pre_tokenizer = ByteLevel(add_prefix_space=True)
    spaced = Grammars(tokenizer)
    constraint = spaced.constrain(spaced.json_schema({"enum": ["yes"]}))
    answer = b""
    while EOS not in (may_come := allowed(constraint)):
        constraint.accept(min(may_come))
        answer += TOKENIZER.token_bytes(min(may_come))
    assert answer == b'"yes"'


# -- what llguidance by itself gets wrong

TINY, HUGE = -(2**63), 2**63 - 1


def fits(text: str, answer: str) -> bool:
    """Like `matches`, but in whatever tokens."""
    constraint = grammars().constrain(text)
    for token_id in TOKENIZER.encode(answer):
        if not constraint.allowed([token_id]):
            return False
        constraint.accept(token_id)
    return EOS in allowed(constraint)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"exclusiveMinimum": 0}, "0.1 1 2.5 1000", "0 0.0 -1"),
        ({"exclusiveMinimum": 0, "maximum": 0.5}, "0.1 0.5 0.0001", "0 0.0 0.51"),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.001}, "0.0001 0.0005", "0 0.001"),
        ({"exclusiveMinimum": 1, "maximum": 1.5}, "1.1 1.5", "1 1.0"),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, "-0.5 -0.1", "0 -0 -0.0"),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, "-1.5 -1.1", "-1 -1.0"),
        ({"minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}, "0.1", "0"),
        ({"minimum": 0, "exclusiveMinimum": False, "maximum": 0.5}, "0 0.1", "-1"),
        ({"minimum": 3, "exclusiveMinimum": 2, "maximum": 4}, "3 4", "2.5"),
        ({"minimum": 0.1, "maximum": 0.3}, "0.1 0.3 0.2", "0.09 0.31"),
        ({"minimum": 0, "maximum": 1e300}, "0 7.5", "-1"),
        ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}, "1 2", "0 3"),
        ({"type": "integer", "minimum": TINY, "maximum": HUGE}, "-5 0 12345678901234567", "1.5"),
        ({"type": "integer", "maximum": 2**53 + 1}, "9007199254740990", "9007199254740994"),
    ],
    ids=str,
)
def test_bounds(bounds: dict[str, Any], inside: str, outside: str) -> None:
    text = grammars().json_schema({"type": "number"} | bounds)
    assert [number for number in inside.split() if not fits(text, number)] == []
    assert [number for number in outside.split() if fits(text, number)] == []


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        (r"^[\x00-\x1f]$", "\n\t", '"\\a'),
        (r"^(\x00|[\x01-\x1f])$", "\n", '"\\'),
        ("^\0|[\x01-\x1f]$", "\n", '"\\'),
        (r"^\p{Cc}$", "\n", '"\\a'),
        (r'^[^"]$', "\n\\aé", '"'),
        (r"^[^\\]$", '\n"aé', "\\"),
        (r'^[^"\\\n]$', "\taé", '"\\\n'),
        (r"^\s$", " \t\n\f\u00a0\u2028\ufeff", "\x85a"),
        (r"^[^\s,]$", "a\x85", " ,\n\u00a0"),
        (r"^\S$", "a\x85", " \n\ufeff"),
        (r"^\w$", "a_9", "é-"),
        (r"^[\w.-]$", "a_9.-", "é,"),
        (r"^\W$", 'é-"', "a"),
        (r"^\d$", "9", "٣a"),
        (r"^.$", 'aé"\\\t', "\n\r\u2028"),
        (r"^a|b$", "ab", "c"),
        (r"^(a|\x07?|\x7f|\v\x0b|\x01b)$", "a", "b\x07\x7f"),
        ("^(a|\x07|\x1f\x7fb)$", "a", "b\x07"),
        (r"^/$", "/", "a"),
        (r"^(\\A|[\\z]|\u{41}|\p{Nd})$", "\\zA5", "Ba"),
    ],
)
def test_patterns(pattern: str, inside: str, outside: str) -> None:
    text = grammars().json_schema({"type": "string", "pattern": pattern})
    assert [c for c in inside if not fits(text, json.dumps(c, ensure_ascii=False))] == []
    assert [c for c in outside if fits(text, json.dumps(c, ensure_ascii=False))] == []


def test_a_key_is_written_in_one_way_only() -> None:
    others = {"type": "string"}
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": others}
    text = grammars().json_schema({"type": "object", **schema})
    assert fits(text, '{"a":1,"b":"x"}')
    assert not fits(text, '{"a":"x"}')
    assert not fits(text, r'{"\u0061":"x"}')


def test_so_many_properties_are_really_as_many() -> None:
    schema = {"type": "object", "required": ["a", "b"], "additionalProperties": {"enum": [1]}}
    text = grammars().json_schema(schema | {"minProperties": 3})
    assert fits(text, '{"a":1,"b":1,"c":1}')
    assert not fits(text, '{"a":1,"b":1}')
    assert not fits(text, '{"a":1,"b":1,"a":1}')


def test_data_that_looks_like_a_schema_stays_as_it_is() -> None:
    data = {"exclusiveMinimum": 0, "pattern": "[^a]", "minProperties": 9}
    for schema in ({"const": data}, {"enum": [data], "default": {"const": TINY}}):
        before = json.dumps(schema)
        assert fits(grammars().json_schema(schema), json.dumps(data))
        assert json.dumps(schema) == before


def test_properties_may_have_the_names_of_keywords() -> None:
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
    for name in ("enum", "const", "properties", "minimum", "pattern", "$ref", "default"):
        schema = {"type": "object", "properties": {name: number}, "required": [name]}
        text = grammars().json_schema(schema)
        assert fits(text, json.dumps({name: 0.25}))
        assert not fits(text, json.dumps({name: 0}))


def test_numbers_as_data() -> None:
    numbers = ["0", "-1", "0.1", "123456789.5", "-0.00001", "9007199254740992"]
    text = grammars().json_schema({"enum": [json.loads(number) for number in numbers]})
    assert [number for number in numbers if not fits(text, number)] == []
    assert not fits(text, "123456789.6")


# -- state


def test_looking_ahead_changes_nothing() -> None:
    constraint = grammars().constrain(grammars().regex("(ab)*"))
    a, b = (TOKENIZER.encode(c)[0] for c in "ab")
    before = allowed(constraint)
    assert constraint.allowed([a, b, a, b, EOS]) == 5
    assert constraint.allowed([a, b, b, a]) == 2
    assert constraint.allowed([b]) == constraint.allowed([]) == 0
    assert allowed(constraint) == before
    assert not constraint.is_over


def test_constraints_of_one_grammar_do_not_disturb_each_other() -> None:
    text = grammars().choice(["yes", "no"])
    first, second = (grammars().constrain(text) for _ in range(2))
    first.accept(TOKENIZER.encode("yes")[0])
    assert allowed(first) == {EOS}
    assert TOKENIZER.encode("no")[0] in allowed(second)
    assert TOKENIZER.encode("no")[0] in allowed(grammars().constrain(text))


def test_a_token_that_is_not_allowed_is_an_error_for_good(
    capfd: pytest.CaptureFixture[str],
) -> None:
    constraint = grammars().constrain(grammars().choice(["yes"]))
    with pytest.raises(RequestError, match="any further"):
        constraint.accept(TOKENIZER.encode("no")[0])
    with pytest.raises(RequestError, match="any further"):
        constraint.mask(np.zeros(TOKENIZER.vocab_size, np.float32))
    assert capfd.readouterr() == ("", "")


def test_only_the_grammars_used_last_stay_compiled() -> None:
    few = Grammars(TOKENIZER, max_kept=2)
    texts = [few.choice([word]) for word in ("one", "two")]
    few.constrain(texts[0])
    texts.append(few.choice(["three"]))
    assert list(few._kept) == [texts[0], texts[2]]
    assert few.constrain(texts[1]).allowed(TOKENIZER.encode("two")) == 1  # compiled again


def test_from_many_threads() -> None:
    few = Grammars(TOKENIZER, max_kept=3)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]

    def use(seed: int) -> None:
        chance = np.random.default_rng(seed)
        for _ in range(30):
            word = words[chance.integers(len(words))]
            constraint = few.constrain(few.choice([word]))
            for token_id in [*TOKENIZER.encode(word), EOS]:
                assert token_id in allowed(constraint)
                constraint.accept(token_id)

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(use, range(8)))) == 8


# -- what is refused, before it takes long or overflows a stack

DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(400):
    DEEP = {"type": "array", "items": DEEP}
CHAIN: dict[str, Any] = {"$ref": "#/$defs/0", "$defs": {"3000": {"type": "integer"}}} | {
    "$defs": {f"{n}": {"type": "array", "items": {"$ref": f"#/$defs/{n + 1}"}} for n in range(3000)}
}
MANY_PATTERNS = {"allOf": [{"pattern": f".*{n}.*"} for n in range(15)]}


ANY_OTHER = {"patternProperties": {"^[ab]$": {"type": "boolean"}}, "minProperties": 3}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "foo"}, "foo"),
        ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
        ({"type": "string", "pattern": "(a"}, "regular expression cannot be used: unclosed group"),
        ({"$ref": "http://127.0.0.1/schema"}, "http"),
        ({"$ref": "#"}, "cannot be used"),
        ({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, "no text can match it$"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "more than one may match at a time$",
        ),
        ({"enum": []}, "cannot be used"),
        ({"enum": [[2**53 + 1]]}, "held to exactly: 9007199254740993;"),
        ({"const": 0.30000000000000004}, "held to exactly"),
        ({"enum": ["a", {"k": "\x7f"}]}, r"control character in '\\x7f'"),
        ({"type": "object", "properties": {"\x01": {}}}, "control character"),
        ({"const": TINY}, "held to exactly"),  # ends the process by itself
        ({"minimum": 10**19}, "bound beyond"),
        ({"default": 2**64}, "more than 64 bits: 18446744073709551616$"),
        ({"default": [{"minimum": TINY - 1}]}, "more than 64 bits: -9223372036854775809$"),
        ({"x": 10**4000}, "more than 64 bits: 10{98}…$"),
        ({"x": 10**4400}, "not JSON: [^;]*digits"),
        ({"maxItems": 2**64}, "more than 64 bits"),
        ({"maxLength": 10**30}, "maxLength is too large: 10{30}; at most 4294967295 is taken$"),
        ({"type": "string", "minLength": 2**63}, "minLength is too large"),
        ({"minimum": 10**4000}, "bound beyond"),
        ({"const": 10**4000}, "held to exactly"),
        ({"multipleOf": 10**4000}, "held to exactly"),
        ({"minProperties": 10**4000}, "minProperties"),
        ({"enum": ["\x01" * 5000]}, "control character"),
        ({"$ref": "#/default/" + "a" * 30_000}, "no schema"),
        ({"type": "a" * 30_000}, "cannot be used"),
        ({"pattern": "[a[b]" + "a" * 4000}, "need a backslash"),
        ({"pattern": "a" * 4000 + "\\"}, "begins no escape"),
        ({"$ref": "#/default", "default": {"const": TINY}}, "no schema: #/default"),
        ({"$ref": "#/$defs", "$defs": {"const": TINY}}, r"no schema: #/\$defs"),
        ({"$ref": "#/%65num/0", "enum": [{}]}, "no schema"),
        (
            {"minProperties": 2, "required": ["a", "a"], "type": "object"} | ANY_OTHER,
            "minProperties",
        ),
        ({"type": "integer", "multipleOf": 1000}, "multipleOf is too large: 1000;"),
        (
            {"allOf": [{"multipleOf": n} for n in range(353, 360)]},
            "353, 354, .* without decimal points their common multiple may be 360",
        ),
        ({"pattern": "^[a[b]$"}, "need a backslash"),
        ({"pattern": "^[a--b]$"}, "need a backslash"),
        ({"pattern": "[]a]"}, "need a backslash"),
        ({"patternProperties": {"a\\": {}}}, "begins no escape"),
        ({"pattern": r"\Aa"}, r"\\A is no escape of ECMAScript's$"),
        ({"pattern": r"a\z"}, r"\\z is no escape"),
        ({"pattern": r"a\Z"}, r"\\Z is no escape"),
        ({"pattern": r"[b\a]"}, r"\\a is no escape"),
        ({"pattern": r"\x{41}"}, "is no escape"),
        ({"pattern": r"\U00000041"}, "is no escape"),
        ({"pattern": r"\pL"}, "is no escape"),
        ({"pattern": r"\b{start}a"}, "cannot be used"),
        ({"patternProperties": {r"\A": {}}}, "is no escape"),
        ({"pattern": "(?i)" + r"\p{L}" * 820}, "patterns has 4104 bytes; at most 4096"),
        (
            {"properties": {n: {"pattern": "^" + "a" * 2047} for n in "abc"}},
            "patterns has 6144 bytes",
        ),
        ({"patternProperties": {"a" * 2048: {"pattern": "b" * 2049}}}, "patterns has 4097 bytes"),
        ({"type": "object", "x": math.nan}, "not JSON"),
        ({"const": "\ud800"}, "surrogate"),
        (DEEP, "recursion"),
        (CHAIN, "at most 32768"),
        ({"$defs": {"a": [{}] * MAX_SUBSCHEMAS}}, "subschemas"),
        (MANY_PATTERNS, "patterns"),
        ({"patternProperties": {f"^{n}$": {} for n in range(MAX_PATTERNS + 1)}}, "patterns"),
        ({"enum": ["x" * MAX_TEXT_BYTES]}, "at most"),
        ({"type": "string", "pattern": "(a?){300}a{300}", "maxLength": 10**5}, "cannot be used"),
    ],
)
def test_schemas(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        grammars().json_schema(schema)
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 500


def test_patterns_that_become_the_same_are_not_both_kept() -> None:
    """llguidance would be told of the last alone."""
    written_out = "^[^\n\r\u2028\u2029]$"
    schema = {"patternProperties": {"^.$": {"type": "integer"}, written_out: {"type": "string"}}}
    with pytest.raises(RequestError, match="twice"):
        grammars().json_schema({"type": "object", **schema})


def test_what_llguidance_cannot_read_is_the_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise ValueError("Value is not JSON serializable: " + "1" * 4000)

    monkeypatch.setattr(LLMatcher, "grammar_from_json_schema", refuse)
    with pytest.raises(RequestError, match="schema cannot be used: Value is not") as caught:
        grammars().json_schema({})
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 500


def test_many_patterns_are_fine_where_nothing_combines_them() -> None:
    properties = {f"p{n}": {"type": "string", "pattern": f"^a{n}$"} for n in range(50)}
    text = grammars().json_schema({"type": "object", "properties": properties})
    assert matches(text, '{"p1": "a1", "p49": "a49"}')


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(a", "^The regular expression cannot be used: unclosed group$"),
        ("a(?=b)", "cannot be used: look-around, .* is not supported$"),
        (r"(a)\1", "cannot be used: backreferences are not supported$"),
        ("\ud800", "surrogate"),
        ("a" * (MAX_REGEX_BYTES + 1), "at most"),
        ("[ab]?" * 819, "cannot be used"),
        ("a{1000000}", "^The grammar cannot be used: it grows too large$"),
        ("\\", "backslash"),
        ("a\\", "backslash"),
        ("(?ix)a # b\nc", "flag x"),
    ],
    ids=lambda text: text[:20].encode("utf-8", "replace"),
)
def test_regular_expressions(pattern: str, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        grammars().regex(pattern, param="structured_outputs")
    assert caught.value.param == "structured_outputs"


def test_what_is_no_break_out() -> None:
    for pattern, answer in {
        "/": "/", r"\/": "/", r"\\/": "\\/", "a\nb": "a\nb", "\\\n": "\n", '"': '"', r"\\": "\\",
        "//i": "//i", "a/ | /b": "a/ ", "#a": "#a", r"\(?x\)": "(x)",
    }.items():  # fmt: skip
        assert fits(grammars().regex(pattern), answer), pattern
    assert not fits(grammars().regex("a/i"), "A/i")


def test_a_grammar_that_grows_too_large_later_names_the_field_it_came_in() -> None:
    constraint = grammars().constrain(grammars().regex("a?b(={1,300}){1,300}", "regex"))
    constraint.accept(*TOKENIZER.encode("b"))
    with pytest.raises(
        RequestError, match=r"be followed any further: it grows too large$"
    ) as caught:
        allowed(constraint)
    assert caught.value.param == "regex"


@pytest.mark.parametrize("choices", [[], ["a", ""], ["\ud800"], ["a" * MAX_TEXT_BYTES, "b"]])
def test_choices(choices: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        grammars().choice(choices)
    assert caught.value.param == "guided_choice"


def test_a_text_that_is_no_grammar() -> None:
    with pytest.raises(RequestError):
        grammars().constrain("nonsense")


@pytest.mark.parametrize("link", ["items", "anyOf", "allOf", "prefixItems", "properties"])
def test_the_deepest_chain_that_is_taken_overflows_no_stack(link: str) -> None:
    """In a thread, as the server does it. An overflow would end this process."""
    length = (MAX_SUBSCHEMAS - 4) // (3 if link == "properties" else 2)

    def linked(n: int) -> dict[str, Any]:
        target: Any = {"$ref": f"#/$defs/{n + 1}"}
        wrapped = {"items": target, "properties": {"p": target}}.get(link, [target])
        return {link: wrapped}

    definitions = {f"{n}": linked(n) for n in range(length)} | {f"{length}": {"type": "integer"}}
    schema = {"$ref": "#/$defs/0", "$defs": definitions}
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(grammars().json_schema, schema).result()


def test_deep_links_of_a_chain() -> None:
    """As many levels as subschemas; each definition is as deep as llguidance reads JSON."""
    definitions: dict[str, Any] = {"9": {"type": "integer"}}
    for n in range(9):
        node: dict[str, Any] = {"$ref": f"#/$defs/{n + 1}"}
        for _ in range(54):
            node = {"items": {"items": node}, "type": "array"}
        definitions[f"{n}"] = node
    with ThreadPoolExecutor(1) as pool:
        schema = {"$ref": "#/$defs/0", "$defs": definitions}
        assert pool.submit(grammars().json_schema, schema).result()


def test_the_largest_that_are_taken() -> None:
    words = [f"w{n:05}" for n in range(MAX_TEXT_BYTES // 6)]
    assert matches(grammars().choice(words), words[-1])
    one = grammars().constrain(grammars().choice(["é" * (MAX_TEXT_BYTES // 2)]))
    assert allowed(one) == {TOKENIZER.encode("é")[0]}


def walk(constraint: GrammarConstraint, chance: np.random.Generator, length: int) -> None:
    """Random tokens that are allowed."""
    for _ in range(length):
        row = np.zeros(TOKENIZER.vocab_size, np.float32)
        constraint.mask(row)
        constraint.accept(int(chance.choice(np.flatnonzero(row == 0))))
        if constraint.is_over:
            break


def test_a_lexer_that_others_have_filled() -> None:
    """Its states, of which there may be only so many, add up over all that use a grammar."""
    own = Grammars(TOKENIZER)
    text = own.regex(r"(\w{1,60} ){1,100}\w+")
    early = own.constrain(text)
    walk(early, np.random.default_rng(0), 3)
    shared = own._kept[text]
    chance = np.random.default_rng(1)
    while not shared_is_full(shared):
        walk_freely(shared.deep_copy(), chance)
    for constraint in (early, own.constrain(text)):
        walk(constraint, chance, 3)
    assert own._kept.get(text) is not shared


def walk_freely(matcher: LLMatcher, chance: np.random.Generator) -> None:
    for _ in range(150):
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error() or matcher.is_stopped():
            return
        ids = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: TOKENIZER.vocab_size])
        matcher.consume_token(int(chance.choice(ids)))


def shared_is_full(matcher: LLMatcher) -> bool:
    copy = matcher.deep_copy()
    copy.compute_bitmask()
    return bool(copy.is_error())


@pytest.mark.parametrize(
    "multiples",
    [[359, 353, 89], [359, 353, 0.7], [7, 100]],
    ids=str,
)
def test_multiples_that_meet(multiples: list[float]) -> None:
    """Their common multiple makes an expression that takes gigabytes."""
    each = [{"multipleOf": multiple} for multiple in multiples]
    with pytest.raises(RequestError, match="common multiple may be 360"):
        grammars().json_schema({"type": "number", "allOf": each})
    apart = {f"p{n}": {"type": "number", **one} for n, one in enumerate(each)}
    assert grammars().json_schema({"type": "object", "properties": apart})


@pytest.mark.parametrize(
    "nothing",
    [
        {"format": "password"},
        {"format": "uuid4"},
        {"uniqueItems": False},
        {"propertyNames": {"type": "string"}},
    ],
    ids=str,
)
def test_what_asks_for_nothing(nothing: dict[str, Any]) -> None:
    assert matches(grammars().json_schema({"type": "string", **nothing}), '"x"')
