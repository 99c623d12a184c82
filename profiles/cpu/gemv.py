"""cpu.gemv: one row times a matrix, as in decode at batch 1, at memory speed. Imports TVM.

TVM's own dl.cpu.GEMV vectorizes over rows of the matrix instead, which gathers, and which LLVM
needs minutes to compile.
"""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir.dlight.base import ScheduleRule
from tvm.target import Target

from profiles.cpu import dot


class GEMV(ScheduleRule):  # type: ignore[misc]
    """Takes dot products of a single row, and their epilogue; the parameters are cpu.matmul's."""

    def __init__(self, lanes: int = 16, columns: int = 8) -> None:
        self.lanes, self.columns = lanes, columns

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        return dot.apply(func, target, one_row=True, lanes=self.lanes, columns=self.columns)
