"""cpu.gemv: one row times a matrix, as in decode at batch 1, at memory speed. Imports TVM."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from profiles.cpu import dot
from profiles.cpu.product import product_of
from profiles.cpu.rule import CPURule, Declined
from profiles.cpu.target import lanes, panel
from profiles.cpu.tile import Tile


class GEMV(CPURule):
    """Takes products of a single row, and their epilogue: each thread streams panels of its own.

    vectors: as cpu.matmul's; both read the same weights.
    """

    def __init__(self, vectors: int = 0) -> None:
        self.vectors = vectors

    def panel(self, target: Target) -> int:
        return panel(target, self.vectors)

    def schedule(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule:
        dots = dot.apply(func, one_row=True, lanes=lanes(target))
        if dots is not None:
            return dots
        product = product_of(func)
        if product.row_extents:
            raise Declined("it has several rows: that is cpu.matmul's")
        return Tile(product, lanes(target), self.panel(target)).schedule()
