"""cpu.elementwise: one element of the output at a time, in any order. Imports TVM."""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.script.ir_builder import tirx as I  # noqa: N812
from tvm.target import Target

from profiles.cpu.blocks import blocks_of, rewrite
from profiles.cpu.rows import each_element, each_row
from profiles.cpu.rule import CPURule, Declined, with_body
from profiles.cpu.target import lanes
from profiles.cpu.vector_math import vectorizable


class Elementwise(CPURule):
    """Takes a single loop nest without reduction: additions, activations, look-ups, packing.

    Threads over rows, vectors along them.
    """

    def schedule(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule:
        blocks, func = blocks_of(func)
        block = blocks[0]
        if len(blocks) > 1 or set(block.kinds) != {"S"}:
            raise Declined("it is not a single loop nest without reduction")
        store, (*rows, length) = block.store, block.extents

        def emit_row(indices: list[Any]) -> None:
            def element(at: Any) -> None:
                variables = dict(zip(block.vars, [*indices, at], strict=True))
                value = vectorizable(rewrite(store.value, variables))
                I.buffer_store(store.buffer, value, [rewrite(i, variables) for i in store.indices])

            each_element(length, lanes(target), element)

        return with_body(func, lambda: each_row(rows, length, emit_row))
