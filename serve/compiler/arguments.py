"""A kernel's work in one call: from the arguments to the names in its counts. Knows no TVM."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from serve.compiler.counts import Value, evaluate

# A tensor's shape, with its values if they are known integers; or a number.
Argument: TypeAlias = "tuple[tuple[int, ...], Any] | int | float | None"
COUNTS = ("flop", "bytes_read", "bytes_written")


def work_of(work: Mapping[str, Any], arguments: Sequence[Argument]) -> tuple[int | None, ...]:
    """FLOP, bytes read and bytes written; None for what is not known.

    `work`: a kernel's in the manifest (serve/compiler/work.py).
    """
    names = _names(work.get("parameters", ()), arguments)
    return tuple(_value(work.get(count), names) for count in COUNTS)


def _value(text: str | None, names: Mapping[str, Value]) -> int | None:
    if text is None:
        return None
    try:
        return evaluate(text, names)
    except KeyError:  # of an argument that was not kept
        return None


def _names(parameters: Iterable[Sequence[Any]], arguments: Sequence[Argument]) -> dict[str, Value]:
    """Shape variables, integer scalars and integer tensors. TVM passes nothing out of order."""
    names: dict[str, Value] = {}
    for (name, _, shape), argument in zip(parameters, arguments, strict=False):
        if isinstance(argument, tuple):
            extents, values = argument
            for text, extent in zip(shape or (), extents, strict=False):
                names |= _variable(str(text), extent)
            if values is not None:
                names[name] = values
        elif isinstance(argument, int):
            names[name] = argument
    return names


def _variable(text: str, extent: int) -> dict[str, int]:
    """`n`, or `1 + n`."""
    found = re.fullmatch(r"(?:(-?\d+) \+ )?([A-Za-z_]\w*)", text)
    return {found[2]: extent - int(found[1] or 0)} if found else {}
