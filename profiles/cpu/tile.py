"""The loops of a product: a register tile of rows times vectors. Imports TVM.

Every output is one chain of multiply-adds over the reduction, from its first element to its last,
begun at 0: so it is the same bits alone, in any batch and in any chunk, whatever the tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.script.ir_builder import tirx as I  # noqa: N812

from profiles.cpu.blocks import rewrite
from profiles.cpu.product import Product
from profiles.cpu.rows import unflatten
from profiles.cpu.rule import Declined, with_body
from profiles.cpu.vector_math import vectorizable

TASK_ROWS = 96  # rows of a thread's task: a panel of the matrix is read from memory once for them


class Tile:
    """`rows` times `vectors` registers of sums, which share what they load."""

    def __init__(self, product: Product, lanes: int, rows: int, panel: int) -> None:
        self.product, self.rows = product, rows
        self.width = product.panel or math.gcd(product.columns, panel)
        self.lanes = math.gcd(self.width, lanes)
        if self.lanes < 4:
            raise Declined(f"its {product.columns} columns are no vectors of 4")

    def schedule(self) -> s_tir.Schedule:
        return with_body(self.product.func, self._tasks)

    def _tasks(self) -> None:
        panels = -(-self.product.columns // self.width)
        if not self.product.row_extents:
            with I.parallel(0, panels) as panel:
                self._rows(1, 0, panel)
            return
        num_rows: Any = 1
        for extent in self.product.row_extents:
            num_rows = num_rows * extent
        blocks = tirx.floordiv(num_rows + TASK_ROWS - 1, TASK_ROWS)
        with I.parallel(0, panels * blocks) as task:
            first = tirx.floormod(task, blocks) * TASK_ROWS
            self._block(first, tirx.min(TASK_ROWS, num_rows - first), tirx.floordiv(task, blocks))

    def _block(self, first: Any, num_rows: Any, panel: Any) -> None:
        """Full tiles, then what is left in tiles of 4, 2 and 1."""
        done: Any = 0
        for rows in (self.rows, *(size for size in (4, 2, 1) if size < self.rows)):
            tiles = tirx.floordiv(num_rows - done, rows)
            with I.serial(0, tiles) as tile:
                self._rows(rows, first + done + tile * rows, panel)
            done = done + tiles * rows

    def _rows(self, rows: int, first: Any, panel: Any) -> None:
        """`rows` rows of one panel."""
        product = self.product
        sums = I.alloc_buffer((rows * self.width,), "float32", scope="local")
        self._each(rows, lambda _row, _column, at: I.buffer_store(sums, _ZERO, [at]))
        with I.serial(0, product.length) as k:

            def add(row: int, column: Any, at: Any) -> None:
                factors = self._left(first + row, k) * self._right(panel, column, k)
                I.buffer_store(sums, sums[at] + factors, [at])

            self._each(rows, add)
        self._store(rows, first, panel, sums)

    def _each(self, rows: int, emit: Any) -> None:
        """emit(row, column in the panel, index of its sum), vector by vector, unrolled."""
        for row in range(rows):
            for vector in range(0, self.width, self.lanes):
                with I.vectorized(0, self.lanes) as lane:
                    emit(row, vector + lane, row * self.width + vector + lane)

    def _store(self, rows: int, first: Any, panel: Any, sums: Any) -> None:
        """The epilogue, in loops of its own: unrolled as the sums are, it is most of the code."""
        spilt = I.alloc_buffer((rows * self.width,), "float32", scope="local")
        self._each(rows, lambda _row, _column, at: I.buffer_store(spilt, sums[at], [at]))
        width: Any = self.width
        if self.product.columns % width:  # the last panel is not full
            width = tirx.min(width, self.product.columns - panel * width)
        with I.serial(0, rows) as row:

            def out(column: Any) -> None:
                self._out(first + row, panel, column, spilt[row * self.width + column])

            vectors = tirx.floordiv(width, self.lanes)
            with I.serial(0, vectors) as vector, I.vectorized(0, self.lanes) as lane:
                out(vector * self.lanes + lane)
            if not isinstance(width, int):
                with I.serial(0, tirx.floormod(width, self.lanes)) as column:
                    out(vectors * self.lanes + column)

    def _out(self, row: Any, panel: Any, column: Any, total: Any) -> None:
        block, epilogue = self.product.block, self.product.epilogue
        last = epilogue or block
        variables = self._at(last.vars[: len(self.product.row_extents)], row)
        variables[last.vars[len(self.product.row_extents)]] = panel * self.width + column
        store = last.store
        value = total
        if epilogue is not None:

            def load(found: TensorLoad) -> Any:
                return total if found.source.same_as(block.store.buffer) else found

            value = vectorizable(rewrite(store.value, variables, load))
        I.buffer_store(store.buffer, value, [rewrite(i, variables) for i in store.indices])

    def _left(self, row: Any, k: Any) -> Any:
        block = self.product.block
        variables = self._at(block.vars[:-2], row)
        variables[block.vars[-1]] = k
        return rewrite(self.product.left, variables)

    def _right(self, panel: Any, column: Any, k: Any) -> Any:
        right, block = self.product.right, self.product.block
        if self.product.panel is not None:
            return right.source[panel, k, column]
        at = {block.vars[-1]: k, block.vars[-2]: panel * self.width + column}
        return rewrite(right, at)

    def _at(self, variables: Sequence[tirx.Var], row: Any) -> dict[tirx.Var, Any]:
        """The row axes' values at a flat row."""
        indices = unflatten(row, self.product.row_extents)
        return dict(zip(variables, indices, strict=True))


_ZERO = tirx.const(0, "float32")
