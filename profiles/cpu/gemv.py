"""cpu.gemv: matrix times vector over contiguous rows, as in decode at batch 1. Imports TVM.

Each output is a dot product of two contiguous rows. Its sum runs in `lanes` partial sums that stay
in vector registers, added up at the end, always in the same order; rows are shared out to the
threads in blocks. TVM's own dl.cpu.GEMV vectorizes over the rows instead, which gathers, and which
LLVM needs minutes to compile.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.analysis.gemv import is_gemv, normalize
from tvm.s_tir.dlight.base import ScheduleRule, try_inline_contiguous_spatial
from tvm.target import Target


class GEMV(ScheduleRule):  # type: ignore[misc]
    """Takes a static matrix, contiguous along the sum, times one vector, and its epilogue.

    lanes: partial sums of one row (registers times their width); halved until it divides the row.
    rows: rows that a thread takes at a time.
    """

    def __init__(self, lanes: int = 64, rows: int = 16) -> None:
        self.lanes, self.rows = lanes, rows

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        if target.kind.name != "llvm" or not isinstance(func, tirx.PrimFunc):
            return None
        sch = s_tir.Schedule(func)
        found = _match(sch)
        if found is None:
            return None
        product, epilogue = found
        lanes = _lanes(sch, product, self.lanes)
        if lanes is None:
            return None
        self._transform(sch, product, epilogue, lanes)
        return sch

    def _transform(self, sch: s_tir.Schedule, product: Any, epilogue: Any, lanes: int) -> None:
        row, reduction = _row_and_reduction(sch, product)
        _, lane = sch.split(reduction, factors=[None, lanes])
        partial = sch.rfactor(lane, 0)
        last = product
        if epilogue is not None:
            last, row = epilogue, sch.fuse(*sch.get_loops(epilogue))
        block, row = sch.split(row, factors=[None, self.rows])
        sch.parallel(block)
        if last is not product:
            sch.compute_at(product, row)
            sch.set_scope(product, 0, "local")
        sch.compute_at(partial, row, preserve_unit_loops=True)
        sch.set_scope(partial, 0, "local")
        _vectorize_partial_sums(sch, partial)


def _match(sch: s_tir.Schedule) -> tuple[Any, Any] | None:
    """The product's block and its epilogue's (or None), if that is all there is."""
    blocks = try_inline_contiguous_spatial(sch, normalize_prim_func(sch))
    if blocks is None or len(blocks) not in (1, 2):
        return None
    if len(blocks) == 2 and not blocks[1].is_injective():
        return None
    if len(blocks[0].iters) not in (2, 3) or is_gemv(sch, blocks[0]) is None:
        return None
    if not normalize(
        sch, blocks[0]
    ):  # None: not understood; False: the sum is not over the inner axis
        return None
    return blocks[0].block_rv, blocks[1].block_rv if len(blocks) == 2 else None


def _row_and_reduction(sch: s_tir.Schedule, product: Any) -> tuple[Any, Any]:
    """The loops of the normalized block, (batch, row, reduction, unit), as two."""
    batch, row, reduction, unit = sch.get_loops(product)
    return sch.fuse(batch, row), sch.fuse(reduction, unit)


def _lanes(sch: s_tir.Schedule, product: Any, wanted: int) -> int | None:
    """The largest number of lanes that divides the row.

    None where the shape is unknown or too odd.
    """
    extents = [sch.get(loop).extent for loop in sch.get_loops(product)]
    if not all(isinstance(extent, tirx.IntImm) for extent in extents):
        return None
    row_length = int(extents[-2]) * int(extents[-1])
    while wanted > 1 and row_length % wanted:
        wanted //= 2
    return wanted if wanted > 1 else None


def _vectorize_partial_sums(sch: s_tir.Schedule, partial: Any) -> None:
    lane, row, step = sch.get_loops(partial)[-3:]
    sch.reorder(row, step, lane)
    sch.vectorize(lane)
    init = sch.decompose_reduction(partial, step)
    sch.vectorize(sch.get_loops(init)[-1])
