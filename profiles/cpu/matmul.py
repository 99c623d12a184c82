"""cpu.matmul: many rows times a matrix, as in prefill and batched decode. Imports TVM."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from profiles.cpu import dot
from profiles.cpu.product import product_of
from profiles.cpu.rule import CPURule, Declined
from profiles.cpu.target import lanes, panel
from profiles.cpu.tile import Tile


class Matmul(CPURule):
    """Takes products of several rows, or of a number known at run time, and their epilogue.

    rows, vectors: of the register tile. Full tiles first, then what is left in tiles of 4, 2 and 1
    rows. The vectors (0: what suits the target) are the width of the packed weights' panels too.
    task_rows: rows of a thread's task; for them, a panel is read from memory once.
    """

    def __init__(self, rows: int = 6, vectors: int = 0, task_rows: int = 96) -> None:
        self.rows, self.vectors, self.task_rows = rows, vectors, task_rows

    def panel(self, target: Target) -> int:
        return panel(target, self.vectors)

    def schedule(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule:
        dots = dot.apply(func, one_row=False, lanes=lanes(target))
        if dots is not None:
            return dots
        product = product_of(func)
        if not product.row_extents:
            raise Declined("it has a single row: that is cpu.gemv's")
        return Tile(
            product, lanes(target), self.panel(target), self.rows, self.task_rows
        ).schedule()
