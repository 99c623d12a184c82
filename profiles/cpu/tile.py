"""The loops of a product: a register tile of rows times vectors. Imports TVM.

Every output is one chain of multiply-adds over the reduction, from its first element to its last,
begun at 0: so it is the same bits alone, in any batch and in any chunk, whatever the tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.script.ir_builder import tirx as I  # noqa: N812

from profiles.cpu.blocks import rewrite
from profiles.cpu.product import Product
from profiles.cpu.rows import each_element, unflatten
from profiles.cpu.rule import Declined, with_body
from profiles.cpu.vector_math import vectorizable


class Tile:
    """`rows` times some vector registers of sums, which share what they load.

    A task is a panel of the matrix and up to `task_rows` rows. Its sums go into a buffer, and from
    there through the epilogue: in the tile's loops, its constants would take their registers.
    """

    def __init__(
        self, product: Product, lanes: int, panel: int, rows: int = 1, task_rows: int = 1
    ) -> None:
        self.product, self.rows, self.task_rows = product, rows, task_rows
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
                self._task(0, 1, panel)
            return
        num_rows: Any = math.prod(self.product.row_extents, start=tirx.const(1, "int64"))
        blocks = tirx.floordiv(num_rows + self.task_rows - 1, self.task_rows)
        with I.parallel(0, panels * blocks) as task:
            first = tirx.floormod(task, blocks) * self.task_rows
            rows = tirx.min(self.task_rows, num_rows - first)
            self._task(first, rows, tirx.floordiv(task, blocks))

    def _task(self, first: Any, num_rows: Any, panel: Any) -> None:
        """Full tiles, then what is left in tiles of 4, 2 and 1; then the epilogue."""
        done = I.alloc_buffer((self.task_rows * self.width,), "float32", scope="local")
        row: Any = 0
        sizes = [size for size in (4, 2, 1) if size < self.rows]
        for rows in (self.rows, *sizes):
            tiles = tirx.floordiv(num_rows - row, rows)
            with I.serial(0, tiles) as tile:
                self._tile(rows, first, row + tile * rows, panel, done)
            row = row + tiles * rows
        with I.serial(0, num_rows) as row:

            def out(column: Any) -> None:
                self._out(first + row, panel, column, done[row * self.width + column])

            width: Any = self.width
            if self.product.columns % width:  # the last panel is not full
                width = tirx.min(width, self.product.columns - panel * width)
            each_element(width, self.lanes, out)

    def _tile(self, rows: int, first: Any, row: Any, panel: Any, done: Any) -> None:
        """The sums of `rows` rows of one panel."""
        sums = I.alloc_buffer((rows * self.width,), "float32", scope="local")
        self._each(rows, lambda _row, _column, at: I.buffer_store(sums, _ZERO, [at]))
        with I.serial(0, self.product.length) as k:

            def add(i: int, column: Any, at: Any) -> None:
                factors = self._left(first + row + i, k) * self._right(panel, column, k)
                I.buffer_store(sums, sums[at] + factors, [at])

            self._each(rows, add)

        def store(i: int, column: Any, at: Any) -> None:
            I.buffer_store(done, sums[at], [(row + i) * self.width + column])

        self._each(rows, store)

    def _each(self, rows: int, emit: Callable[[int, Any, Any], None]) -> None:
        """emit(row, column in the panel, index of its sum), vector by vector, unrolled."""
        for row in range(rows):
            for vector in range(0, self.width, self.lanes):
                with I.vectorized(0, self.lanes) as lane:
                    emit(row, vector + lane, row * self.width + vector + lane)

    def _out(self, row: Any, panel: Any, column: Any, total: Any) -> None:
        block, epilogue = self.product.block, self.product.epilogue
        last = epilogue or block
        variables = self._at(last.vars, row, panel * self.width + column)
        value = total
        if epilogue is not None:

            def load(found: TensorLoad) -> Any:
                return total if found.source.same_as(block.store.buffer) else found

            value = vectorizable(rewrite(epilogue.store.value, variables, load))
        at = [rewrite(index, variables) for index in last.store.indices]
        I.buffer_store(last.store.buffer, value, at)

    def _left(self, row: Any, k: Any) -> Any:
        *rows, _, length = self.product.block.vars
        return rewrite(self.product.left, self._at([*rows, length], row, k))

    def _right(self, panel: Any, column: Any, k: Any) -> Any:
        right = self.product.right
        if self.product.panel is not None:
            return right.source[panel, k, column]
        *_, columns, length = self.product.block.vars
        return rewrite(right, {length: k, columns: panel * self.width + column})

    def _at(self, variables: Sequence[tirx.Var], row: Any, last: Any) -> dict[tirx.Var, Any]:
        """The row axes' values at a flat row, and that of the axis after them."""
        indices = [*unflatten(row, self.product.row_extents), last]
        return dict(zip(variables, indices, strict=False))


_ZERO = tirx.const(0, "float32")
