"""What llguidance would get wrong of a JSON schema or a regular expression: put right where that is
possible, refused where not. So the answer is either what was asked for or a 400.

Whatever is changed becomes stricter by as little as can be, never looser. Knows llguidance's ways
(docs/adr/0007-structured-output.md), but not how it is called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any
from urllib.parse import unquote

from serve.errors import RequestError

COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "patternProperties"}
# Keywords whose objects are subschemas by name, and those whose values are data, not schemas.
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_DATA = {"const", "enum", "default", "examples"}

# llguidance computes with doubles, and reads them wrongly by a bit beyond these.
_DIGITS, _STEP = 15, Decimal("1e-22")
_MAX_EXACT = 2**53
_MAX_BOUND = 10**18
_MAX_MULTIPLE = 360
_MAX_LENGTH = 2**32 - 1  # of a string; more is no count in a regular expression
_INTEGERS = range(-(2**63), 2**64)  # what can be handed to llguidance at all

# Those that llguidance holds strings to, and OpenAPI's of numbers, which it knows to say nothing.
_FORMATS = {
    *("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
    *("int32", "int64", "float", "double"),
}

# A pattern's tokens, as far as they matter here. Classes in classes stay undone.
_ESCAPE = (
    r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[xuUpP]\{[^}]*\}|[pP][^{]|[^xuUpP])"
)
_CLASS = rf"\[\^?(?:{_ESCAPE}|[^\[\]\\])+\]"
_FLAGS = r"\(\?[a-zA-Z-]+[:)]"
_TOKEN = re.compile(rf"{_CLASS}|{_ESCAPE}|{_FLAGS}|.", re.DOTALL)
_ANY_ESCAPE = re.compile(_ESCAPE, re.DOTALL)
_SPACE = "\\t-\\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
# What JSON has no escape of two characters for: llguidance, told to use no others, forgets these.
_UNWRITABLE = r"\x00-\x07\x0b\x0e-\x1f\x7f"
_IS_UNWRITABLE = re.compile(f"[{_UNWRITABLE}]")
_MAY_BE_SET = re.compile(rf"\[|\\[xuUpPav]|{_IS_UNWRITABLE.pattern}")
# What Rust's expressions and JSON Schema's (ECMAScript's) read differently in a class.
_AMBIGUOUS = re.compile(r"&&|--|~~|-\\[dDsSwW]")
# Escapes of Rust's that are a letter, or nothing, in ECMAScript.
_FOREIGN = re.compile(r"\\(?:[AaUZz]|x\{|[pP][^{])")


def check_regex(pattern: str, param: str) -> None:
    """llguidance forgets a last backslash, and the line ends with which flag x's comments end."""
    list(_tokens(pattern, param))


def make_sound(schema: dict[str, Any], param: str) -> None:
    """Change the schema in place. Raises RequestError for what cannot be held to."""
    nodes = list(_subschemas(schema))
    for node in nodes:
        _make_node_sound(node, param)
    _check_multiples(nodes, param)
    for found in _values(schema):
        if _is_number(found) and isinstance(found, int) and found not in _INTEGERS:
            raise RequestError(
                f"The JSON schema has an integer of more than 64 bits: {_cut(str(found))}", param
            )


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """It and whatever in it a $ref could make one, each before what is in it."""
    todo: list[Any] = [schema]
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo.extend(node)
        elif isinstance(node, dict):
            yield node
            for key, value in node.items():
                if key in _MAPS and isinstance(value, dict):
                    todo.extend(value.values())
                elif key not in _DATA:
                    todo.append(value)


def _make_node_sound(node: dict[str, Any], param: str) -> None:
    """Of one schema, or of what only looks like one: then nothing is of the right type."""
    _drop_what_says_nothing(node)
    names = list(node["properties"]) if isinstance(node.get("properties"), dict) else []
    data = [node.get(key) for key in ("const", "enum", "multipleOf", "required")]
    _check_data([names, data], param)
    _check_ref(node.get("$ref"), param)
    _check_min_properties(node, param)
    _check_lengths(node, param)
    _make_bounds_inclusive(node, param)
    if isinstance(node.get("pattern"), str):
        node["pattern"] = _sound_pattern(node["pattern"], param)
    if isinstance(node.get("patternProperties"), dict):
        node["patternProperties"] = _sound_keys(node["patternProperties"], param)


def _drop_what_says_nothing(node: dict[str, Any]) -> None:
    """Of what llguidance refuses: an unknown format is an annotation, as JSON Schema has it."""
    if isinstance(node.get("format"), str) and node["format"] not in _FORMATS:
        del node["format"]
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]
    if node.get("propertyNames") in ({}, True, {"type": "string"}):
        del node["propertyNames"]


# -- numbers


def _make_bounds_inclusive(node: dict[str, Any], param: str) -> None:
    """llguidance lets an exclusive bound itself through, if the next integer is out of bounds."""
    for name, exclusive_name, sign in (
        ("minimum", "exclusiveMinimum", 1),
        ("maximum", "exclusiveMaximum", -1),
    ):
        bound: Any = node.get(name)
        exclusive: Any = node.get(exclusive_name)
        bounds = []
        if _is_number(bound):
            bounds.append(_inside(bound, sign, exclusive is True, param))  # True: of draft 4
        if _is_number(exclusive):
            bounds.append(_inside(exclusive, sign, True, param))
        if bounds:
            node[name] = max(bounds) if sign == 1 else min(bounds)
        if _is_number(exclusive) or isinstance(exclusive, bool):
            del node[exclusive_name]


def _inside(bound: float, sign: int, is_exclusive: bool, param: str) -> float:
    """The widest inclusive bound that llguidance can keep. `sign`: on which side numbers are in."""
    if not is_exclusive and isinstance(bound, int) and abs(bound) <= _MAX_EXACT:
        return bound
    exact = max(Decimal(str(bound)) * sign, Decimal(-_MAX_BOUND))
    if exact > _MAX_BOUND:
        raise RequestError(
            f"The JSON schema has a bound beyond {_MAX_BOUND}: {_cut(str(bound))}", param
        )
    context = Context(prec=_DIGITS, rounding=ROUND_CEILING)
    found = exact.next_plus(context) if is_exclusive else context.plus(exact)
    if 0 < abs(found) < 1:
        found = found.quantize(_STEP, ROUND_CEILING)
    return float(found * sign) + 0.0  # no -0


def _check_data(value: Any, param: str) -> None:
    """Numbers are rounded; and at the least of 64 bits, llguidance overflows its stack."""
    for found in _values(value):
        if isinstance(found, str) and _IS_UNWRITABLE.search(found):
            raise RequestError(
                f"The JSON schema has a control character in {_cut(repr(found))}", param
            )
        if _is_number(found) and not _is_exact(found):
            raise RequestError(
                f"The JSON schema has a number that cannot be held to exactly: {_cut(str(found))}; "
                f"integers may go to 2^53, others may have {_DIGITS} digits",
                param,
            )


def _is_exact(number: float) -> bool:
    if isinstance(number, int) or abs(number) > _MAX_EXACT:
        return abs(number) <= _MAX_EXACT
    exact = Decimal(str(number)).normalize()
    return len(exact.as_tuple().digits) <= _DIGITS and _places(exact) <= _places(_STEP)


def _check_multiples(nodes: Sequence[dict[str, Any]], param: str) -> None:
    """llguidance's expressions grow with them; where schemas meet, with their common multiple."""
    found = [node["multipleOf"] for node in nodes if _is_number(node.get("multipleOf"))]
    multiples = {abs(Decimal(str(multiple))) for multiple in found}
    meet = multiples if any(COMBINING & node.keys() for node in nodes) else ()
    for group in [*([multiple] for multiple in multiples), meet]:
        places = max(map(_places, group), default=0)
        if math.lcm(*(int(multiple.scaleb(places)) for multiple in group)) > _MAX_MULTIPLE:
            raise RequestError(
                f"The JSON schema's multipleOf is too large: {', '.join(map(str, sorted(group)))}; "
                f"without decimal points their common multiple may be {_MAX_MULTIPLE}",
                param,
            )


def _check_lengths(node: dict[str, Any], param: str) -> None:
    for name in ("minLength", "maxLength"):
        length: Any = node.get(name)
        if _is_number(length) and length > _MAX_LENGTH:
            raise RequestError(
                f"The JSON schema's {name} is too large: {_cut(str(length))}; at most "
                f"{_MAX_LENGTH} is taken",
                param,
            )


def _places(number: Decimal) -> int:
    """Behind the decimal point."""
    return max(0, -int(number.normalize().as_tuple().exponent))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(data: Any) -> Iterator[Any]:
    """All that is in it, keys too."""
    todo = [data]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list):
            todo += value
        else:
            yield value


# -- objects and references


def _check_min_properties(node: dict[str, Any], param: str) -> None:
    """A key may come twice, which llguidance counts twice; those that are required come once."""
    least, required = node.get("minProperties"), node.get("required", [])
    if not isinstance(least, int) or not isinstance(required, list):
        return
    num_sure = len({name for name in required if isinstance(name, str)}) + 1
    if least > num_sure:
        raise RequestError(
            f"The JSON schema's minProperties cannot be held to: {_cut(str(least))} is more than "
            "one above the number of required properties",
            param,
        )


def _check_ref(ref: Any, param: str) -> None:
    """One to something that was not looked at as a schema would make one of it."""
    if not isinstance(ref, str):
        return
    is_map, is_data = False, False
    for name in unquote(ref).partition("#")[2].split("/")[1:]:
        is_map, is_data = not is_map and name in _MAPS, is_data or (not is_map and name in _DATA)
    if is_map or is_data:
        raise RequestError(f"The JSON schema has a $ref to what is no schema: {_cut(ref)}", param)


# -- patterns


def _sound_keys(by_pattern: dict[str, Any], param: str) -> dict[str, Any]:
    found = {_sound_pattern(pattern, param): value for pattern, value in by_pattern.items()}
    if len(found) < len(by_pattern):  # one would take the other's place
        raise RequestError("The JSON schema's patternProperties has a pattern twice", param)
    return found


def _sound_pattern(pattern: str, param: str) -> str:
    """The same, but that no class or escape stands for a control character that cannot be written.

    Besides, where a class has all of them, llguidance lets the quote and the backslash through,
    whether they are in it or not.
    """
    found = []
    for token in _tokens(pattern, param):
        if token == "[" or (token[0] == "[" and _AMBIGUOUS.search(token)):
            raise RequestError(
                f"The pattern {_cut(repr(pattern))} cannot be used: inside of a class [...], the "
                "characters [ ] - & ~ need a backslash where they stand for themselves",
                param,
            )
        for escape in _ANY_ESCAPE.findall(token):
            if _FOREIGN.match(escape):
                raise RequestError(
                    f"The pattern {_cut(repr(pattern))} cannot be used: {_cut(escape)} is no "
                    "escape of ECMAScript's",
                    param,
                )
        token = _ANY_ESCAPE.sub(_of_ecmascript, "[^\n\r\u2028\u2029]" if token == "." else token)
        found.append(f"[{token}&&[^{_UNWRITABLE}]]" if _MAY_BE_SET.match(token) else token)
    return "".join(found)


def _of_ecmascript(escape: re.Match[str]) -> str:
    """Of the classes that llguidance leaves to Rust the one that has other characters there."""
    return {r"\s": f"[{_SPACE}]", r"\S": f"[^{_SPACE}]"}.get(escape[0], escape[0])


def _tokens(pattern: str, param: str) -> Iterator[str]:
    for token in _TOKEN.findall(pattern):
        if token == "\\":
            raise RequestError(f"A backslash in {_cut(repr(pattern))} begins no escape", param)
        if token.startswith("(?") and "x" in token:
            raise RequestError("The regular expression's flag x is not supported", param)
        yield token


def _cut(text: str) -> str:
    """What a client sent, short enough to be sent back."""
    return text if len(text) <= 100 else f"{text[:99]}…"
