"""cpu.reduction: layer norm, softmax and the like, row by row. Imports TVM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.script.ir_builder import tirx as I  # noqa: N812
from tvm.target import Target

from profiles.cpu.blocks import Block, are, blocks_of, loads_of, rewrite
from profiles.cpu.rows import each_element, each_row
from profiles.cpu.rule import CPURule, Declined, with_body
from profiles.cpu.target import lanes
from profiles.cpu.vector_math import vectorizable

_COMBINERS = {tirx.Add: tirx.Add, tirx.Mul: tirx.Mul, tirx.Max: tirx.Max, tirx.Min: tirx.Min}
_NEUTRAL = {tirx.Add: 0.0, tirx.Mul: 1.0}  # any initial value will do for the others


class Reduction(CPURule):
    """Takes reductions over the last axis, each of which may use those before it, and what is made
    of them, elementwise.

    Threads over rows. Each reduction runs in one partial result for each lane of a vector, combined
    in a fixed order at the end.
    """

    def schedule(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule:
        blocks, func = blocks_of(func)
        *reductions, last = blocks
        if "R" in last.kinds:
            reductions.append(last)
        if not reductions:
            raise Declined("it has no reduction")
        for block in reductions:
            _check(block)
        if any(b.extents[-1:] != last.extents[-1:] for b in blocks):
            raise Declined("its loop nests do not run over the same rows")
        rows = last.extents[:-1]
        if any([e for e in b.extents[:-1] if e != 1] != rows for b in blocks if b is not last):
            raise Declined("its loop nests do not run over the same rows")
        for number, block in enumerate(blocks[:-1]):
            _check_use(block, blocks[number + 1 :])
        nest = _Nest(reductions, last, lanes(target))
        return with_body(func, lambda: each_row(rows, last.extents[-1], nest.row))


def _check(block: Block) -> None:
    kinds = block.kinds
    if "R" not in kinds:
        raise Declined("a loop nest before the last is no reduction")
    if kinds != "S" * (len(kinds) - 1) + "R":
        raise Declined("a reduction is not over the last axis alone")
    combiner, start = type(block.store.value), block.start
    if combiner not in _COMBINERS or not block.accumulates:
        raise Declined("a reduction is no sum, product, maximum or minimum")
    if start is None or _NEUTRAL.get(combiner, start) != start:
        raise Declined("a reduction does not begin at its neutral element")


def _check_use(block: Block, later: Sequence[Block]) -> None:
    """That each row of the later ones uses its own result alone."""
    if not _are_row(block.store.indices, block):
        raise Declined("a reduction stores its results in another order")
    loads = [
        (user, load) for user in later for load in loads_of(user.store.value, block.store.buffer)
    ]
    if not all(_are_row(load.indices, user) for user, load in loads):
        raise Declined("a row uses another row's reduction")


def _are_row(indices: Sequence[Any], block: Block) -> bool:
    """Whether they are the block's row, unit axes left out."""
    axes = list(zip(block.vars[:-1], block.extents[:-1], strict=True))
    units = [variable for variable, extent in axes if extent == 1]
    found = [index for index in indices if not any(index.same_as(unit) for unit in units)]
    return are(found, [variable for variable, extent in axes if extent != 1])


class _Nest:
    """The body of the loop over rows."""

    def __init__(self, reductions: Sequence[Block], last: Block, lanes: int) -> None:
        self.reductions, self.last, self.lanes = reductions, last, lanes

    def row(self, indices: list[Any]) -> None:
        results: list[tuple[Any, Any]] = []  # a reduction's buffer, and its result in this row
        for block in self.reductions:
            results.append((block.store.buffer, self._reduce(block, indices, results)))
        if self.last in self.reductions:
            self._store(self.last, [*indices], results[-1][1][0])
            return
        last = self.last

        def element(at: Any) -> None:
            self._store(
                last, [*indices, at], self._value(last, last.store.value, [*indices, at], results)
            )

        each_element(last.extents[-1], self.lanes, element)

    def _reduce(self, block: Block, indices: list[Any], results: Sequence[tuple[Any, Any]]) -> Any:
        combine, start = _COMBINERS[type(block.store.value)], block.init.value
        operand = block.store.value.b
        length, dtype = block.extents[-1], str(block.store.buffer.ty.dtype)
        if len(indices) < len(block.iters) - 1:  # the last loop nest has lost unit axes
            rest = iter(indices)
            indices = [0 if extent == 1 else next(rest) for extent in block.extents[:-1]]

        def value(at: Any) -> Any:
            return self._value(block, operand, [*indices, at], results)

        total = I.alloc_buffer((1,), dtype, scope="local")
        partial = I.alloc_buffer((self.lanes,), dtype, scope="local")
        with I.vectorized(0, self.lanes) as lane:
            I.buffer_store(partial, start, [lane])
        vectors = tirx.floordiv(length, self.lanes)
        with I.serial(0, vectors) as vector, I.vectorized(0, self.lanes) as lane:
            both = combine(partial[lane], value(vector * self.lanes + lane))
            I.buffer_store(partial, both, [lane])
        I.buffer_store(total, start, [0])
        with I.serial(0, tirx.floormod(length, self.lanes)) as left_over:
            both = combine(total[0], value(vectors * self.lanes + left_over))
            I.buffer_store(total, both, [0])
        with I.unroll(0, self.lanes) as lane:
            I.buffer_store(total, combine(total[0], partial[lane]), [0])
        return total

    def _value(
        self, block: Block, value: Any, indices: list[Any], results: Sequence[tuple[Any, Any]]
    ) -> Any:
        def load(found: TensorLoad) -> Any:
            return next((r[0] for buffer, r in results if found.source.same_as(buffer)), found)

        variables = dict(zip(block.vars, indices, strict=True))
        return vectorizable(rewrite(value, variables, load))

    def _store(self, block: Block, indices: list[Any], value: Any) -> None:
        variables = dict(zip(block.vars, indices, strict=False))
        at = [rewrite(index, variables) for index in block.store.indices]
        I.buffer_store(block.store.buffer, value, at)
