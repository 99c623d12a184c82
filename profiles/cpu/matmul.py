"""cpu.matmul: many rows times a matrix, as in prefill and batched decode. Imports TVM."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir.dlight.base import ScheduleRule
from tvm.target import Target

from profiles.cpu import dot


class Matmul(ScheduleRule):  # type: ignore[misc]
    """Takes dot products of several rows, or of a number known at run time, and their epilogue.

    lanes: partial sums of an output, halved until they divide its length. columns: outputs side by
    side.
    """

    def __init__(self, lanes: int = 16, columns: int = 8) -> None:
        self.lanes, self.columns = lanes, columns

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        return dot.apply(func, target, one_row=False, lanes=self.lanes, columns=self.columns)
