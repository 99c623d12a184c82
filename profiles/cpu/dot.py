"""Rows of dot products: cpu.matmul and cpu.gemv where the matrix is not packed. Imports TVM.

Every output is the dot product of two rows that are contiguous in memory. Its sum runs in `lanes`
partial sums in a vector register, added up at the end, always in the same order: so an output is
the same bits alone, in any batch, and in any chunk. COLUMNS outputs are computed side by side:
they share the loads of the left row, and give the processor independent sums to work on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline_contiguous_spatial

from profiles.cpu.blocks import Block, check_fusable
from profiles.cpu.rule import Declined


@dataclass(frozen=True)
class DotProducts:
    """`product` computes out[…, n] = sum over k of left[…, k] * right[n, k]; `epilogue` or None.

    is_one_row: whether … is a single row. length: the extent of k.
    """

    product: Any
    epilogue: Any
    is_one_row: bool
    length: int


COLUMNS = 8


def apply(func: tirx.PrimFunc, *, one_row: bool, lanes: int) -> s_tir.Schedule | None:
    """Schedule dot products of one row or of several; None for anything else. Raises Declined."""
    sch = s_tir.Schedule(func)
    dots = _match(sch)
    if dots is None:
        return None
    if dots.is_one_row != one_row:
        other = "cpu.matmul" if one_row else "cpu.gemv"
        raise Declined(f"it has {'several rows' if one_row else 'a single row'}: that is {other}'s")
    while dots.length % lanes:
        lanes //= 2
    if lanes == 1:
        return None
    _schedule(sch, dots, lanes)
    return sch


def _match(sch: s_tir.Schedule) -> DotProducts | None:
    blocks = try_inline_contiguous_spatial(sch, normalize_prim_func(sch))
    if blocks is None or len(blocks) not in (1, 2):
        return None
    if len(blocks) == 2 and not blocks[1].is_injective():
        return None
    product, kinds = blocks[0], blocks[0].dom_kind()
    if len(kinds) < 2 or kinds != "S" * (len(kinds) - 1) + "R":
        return None
    *rows, columns, length = product.dom()
    if not (_is_known(columns) and _is_known(length)):
        return None
    if not _is_dot_product(sch.get(product.block_rv)):
        return None
    between = [sch.get(block.block_rv).body.buffer for block in blocks[:-1]]
    check_fusable(sch.mod["main"], between)
    is_one_row = all(_is_known(extent) and int(extent) == 1 for extent in rows)
    epilogue = blocks[1].block_rv if len(blocks) == 2 else None
    return DotProducts(product.block_rv, epilogue, is_one_row, int(length))


def _is_known(extent: Any) -> bool:
    return isinstance(extent, int | tirx.IntImm)


def _is_dot_product(block: s_tir.SBlock) -> bool:
    """out[…, n] = out[…, n] + left[…, k] * right[n, k], in f32."""
    store = block.body
    if not isinstance(store, tirx.BufferStore) or not isinstance(store.value, tirx.Add):
        return False
    factors = store.value.b
    if not isinstance(factors, tirx.Mul) or store.buffer.dtype != "float32":
        return False
    sum_ = Block(tuple(block.iter_vars), store, block.init)
    if not sum_.accumulates or sum_.start != 0:
        return False
    left, right = factors.a, factors.b
    if not isinstance(left, TensorLoad) or not isinstance(right, TensorLoad):
        return False
    *_, n, k = [iter_var.var for iter_var in block.iter_vars]
    expected = ((left.indices[-1], k), (right.indices[-1], k), (store.indices[-1], n))
    row = right.indices[0]
    return len(right.indices) == 2 and row.same_as(n) and all(a.same_as(b) for a, b in expected)


def _schedule(sch: s_tir.Schedule, dots: DotProducts, lanes: int) -> None:
    """Threads over blocks of columns; in each, row after row, so that its weights stay in cache."""
    product, has_epilogue = dots.product, dots.epilogue is not None
    _, lane = sch.split(sch.get_loops(product)[-1], factors=[None, lanes])
    partial = sch.rfactor(lane, -1)  # innermost: the lanes of a sum lie side by side
    if has_epilogue:
        *rows, column = sch.get_loops(dots.epilogue)
    else:
        *rows, column, _ = sch.get_loops(product)
    block, column = sch.split(column, factors=[None, COLUMNS])
    sch.reorder(block, *rows, column)
    inner = sch.fuse(*rows) if rows else block
    sch.parallel(block)
    if has_epilogue:
        sch.compute_at(product, inner, preserve_unit_loops=True)
        sch.set_scope(product, 0, "local")
    sch.compute_at(partial, inner, preserve_unit_loops=True)
    sch.set_scope(partial, 0, "local")
    _keep_in_registers(sch, partial, product, num_outer=2 if rows else 1)


def _keep_in_registers(sch: s_tir.Schedule, partial: Any, product: Any, num_outer: int) -> None:
    """Unroll and vectorize, so that each partial sum has a register of its own."""
    lane, *outputs, step = sch.get_loops(partial)[num_outer:]
    sch.reorder(step, *outputs, lane)
    sch.vectorize(lane)
    init = sch.decompose_reduction(partial, step)
    sch.vectorize(sch.get_loops(init)[-1])
    for loop in (*outputs, *sch.get_loops(init)[num_outer:-1]):
        sch.unroll(loop)
    for loop in sch.get_loops(product)[num_outer:]:
        sch.unroll(loop)
