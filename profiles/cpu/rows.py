"""Loops over rows and over the elements of one, in vectors. Imports TVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as I  # noqa: N812

SERIAL_ELEMENTS = 1 << 14  # starting threads costs more than so few


def each_row(extents: Sequence[Any], length: Any, emit: Callable[[list[Any]], None]) -> None:
    """emit(the row's indices), rows of `length` elements over threads if they are many."""
    num_rows: Any = 1
    for extent in extents:
        num_rows = num_rows * extent
    size = num_rows * length
    loop = I.serial if isinstance(size, int) and size <= SERIAL_ELEMENTS else I.parallel
    with loop(0, num_rows) as row:
        emit(unflatten(row, extents))


def unflatten(row: Any, extents: Sequence[Any]) -> list[Any]:
    """A flat row's index on each axis, the last one innermost."""
    indices: list[Any] = []
    for axis, extent in reversed(list(enumerate(extents))):
        indices.insert(0, tirx.floormod(row, extent) if axis else row)
        row = tirx.floordiv(row, extent)
    return indices


def each_element(length: Any, lanes: int, emit: Callable[[Any], None]) -> None:
    """emit(index), in vectors and then one by one."""
    vectors = tirx.floordiv(length, lanes)
    if not isinstance(length, int) or length >= lanes:
        with I.serial(0, vectors) as vector, I.vectorized(0, lanes) as lane:
            emit(vector * lanes + lane)
    if not isinstance(length, int) or length % lanes:
        with I.serial(0, tirx.floormod(length, lanes)) as left_over:
            emit(vectors * lanes + left_over)
