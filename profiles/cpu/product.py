"""Recognise rows times a matrix, with an epilogue. Imports TVM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import sym, tirx
from tvm.ir import Range, TensorLoad

from profiles.cpu.blocks import Block, are, blocks_of, known, loads_of
from profiles.cpu.rule import Declined


@dataclass(frozen=True)
class Product:
    """out[rows, n] = sum over k of left[.., k] * right[n, k], then an elementwise epilogue.

    `panel`: right is packed as [ceil(columns / panel), length, panel]; None: it is [length,
    columns]. `func` is what the blocks belong to.
    """

    func: tirx.PrimFunc
    block: Block
    epilogue: Block | None
    left: TensorLoad
    right: TensorLoad
    panel: int | None

    @property
    def row_extents(self) -> list[Any]:
        """Without unit axes: empty for a single row."""
        return self.block.extents[:-2]

    @property
    def columns(self) -> int:
        return int(self.block.extents[-2])

    @property
    def length(self) -> int:
        return int(self.block.extents[-1])


def product_of(func: tirx.PrimFunc) -> Product:
    """Raises Declined if the function is something else."""
    blocks, func = blocks_of(func)
    block, *rest = blocks
    kinds = block.kinds
    if len(kinds) < 2 or kinds != "S" * (len(kinds) - 1) + "R":
        raise Declined("it does not begin with one reduction over the last axis")
    left, right = _factors(block)
    if len(rest) > 1:
        raise Declined(f"{len(rest)} loop nests follow the product, and one epilogue is fused")
    if not all(isinstance(extent, int) for extent in block.extents[-2:]):
        raise Declined("the matrix has a size that is not known when compiling")
    epilogue = rest[0] if rest else None
    if epilogue is not None:
        _check_epilogue(block, epilogue)
    return Product(func, block, epilogue, left, right, _panel(block, right))


def _factors(block: Block) -> tuple[TensorLoad, TensorLoad]:
    """The factor that depends on the rows, and the one that depends on the column."""
    store = block.store
    total = store.value
    if not isinstance(total, tirx.Add) or str(store.buffer.ty.dtype) != "float32":
        raise Declined("it is not a sum in float32")
    if not isinstance(total.b, tirx.Mul) or not block.stores_at_iters or not block.accumulates:
        raise Declined("it is not a sum of products")
    if block.start != 0:
        raise Declined("the sum does not begin at 0")
    factors = [total.b.a, total.b.b]
    if any(not isinstance(f, TensorLoad) or str(f.source.ty.dtype) != "float32" for f in factors):
        raise Declined("a factor is not an element of a float32 tensor")
    k = block.vars[-1]
    if not factors[0].indices[-1].same_as(k):
        factors.reverse()
    left, right = factors
    if not left.indices[-1].same_as(k) or not are(left.indices, [*block.vars[:-2], k]):
        raise Declined("no factor is rows of contiguous elements along the reduction")
    return left, right


def _panel(block: Block, right: TensorLoad) -> int | None:
    """How the matrix lies in memory."""
    column, k = block.vars[-2:]
    if are(right.indices, [k, column]):
        return None
    if are(right.indices, [column, k]):
        raise Declined("the matrix is [columns, length]: its rows would have to be packed first")
    shape = [known(extent) for extent in right.source.ty.shape]
    if len(shape) != 3 or not all(isinstance(extent, int) for extent in shape):
        raise Declined("the matrix is neither [length, columns] nor packed in panels")
    analyzer, panel = sym.Analyzer(), shape[-1]
    analyzer.bind(column, Range(0, block.extents[-2]))
    expected = (tirx.floordiv(column, panel), k, tirx.floormod(column, panel))
    for index, value in zip(right.indices, expected, strict=True):
        if not analyzer.can_prove_equal(index, value):
            raise Declined("the matrix is neither [length, columns] nor packed in panels")
    return int(panel)


def _check_epilogue(block: Block, epilogue: Block) -> None:
    out = block.store.buffer

    if set(epilogue.kinds) != {"S"} or not epilogue.stores_at_iters:
        raise Declined("what follows the product is not elementwise")
    if len(epilogue.iters) != len(block.iters) - 1:
        raise Declined("what follows the product has another shape")
    loads = loads_of(epilogue.store.value, out)
    if not loads or any(not are(load.indices, epilogue.vars) for load in loads):
        raise Declined("what follows the product does not use it element by element")
