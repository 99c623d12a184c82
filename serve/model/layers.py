"""Linear and Embedding over weights as they are, or packed in panels for the CPU.

Packed, the rows of a weight (out, in) lie in panels of `panel` side by side: [ceil(out / panel),
in, panel], filled up with zeros. Every multiply-add of a product then loads the next elements in
memory, for one row as for many.
"""

from __future__ import annotations

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op


def weight(rows: int, columns: int, panel: int | None) -> nn.Parameter:
    shape = (rows, columns) if panel is None else (-(-rows // panel), columns, panel)
    return nn.Parameter(shape, "float32")


class Linear(nn.Module):  # type: ignore[misc]
    """(…, in) -> (…, out)."""

    def __init__(self, in_features: int, out_features: int, panel: int | None) -> None:
        self.out_features = out_features
        self.weight = weight(out_features, in_features, panel)
        self.bias = nn.Parameter((out_features,), "float32")

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight, self.out_features) + self.bias


class Embedding(nn.Module):  # type: ignore[misc]
    """ids (n,) int32 -> (n, width)."""

    def __init__(self, num: int, width: int, panel: int | None = None) -> None:
        self.num, self.width, self.panel = num, width, panel
        self.weight = weight(num, width, panel)

    def forward(self, ids: Tensor) -> Tensor:
        if self.panel is None:
            return op.take(self.weight, ids, axis=0)
        return op.tensor_expr_op(_take, "take", [self.weight, ids])


def matmul(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """x @ weight.T, (…, in) -> (…, rows), of a weight of either layout."""
    if weight.ndim == 2:
        return op.matmul(x, op.permute_dims(weight))
    return op.tensor_expr_op(_matmul, "matmul", [x, weight, rows])


def pack(weight: Tensor, panel: int) -> Tensor:
    """(out, in) -> [ceil(out / panel), in, panel]."""
    return op.tensor_expr_op(_pack, "pack", [weight, panel])


def _matmul(x: te.Tensor, packed: te.Tensor, rows: int) -> te.Tensor:
    panel = packed.shape[2]
    k = te.reduce_axis((0, packed.shape[1]), "k")

    def dot(*at: tirx.Var) -> tirx.Expr:
        *row, n = at
        return te.sum(x(*row, k) * packed(tirx.floordiv(n, panel), k, tirx.floormod(n, panel)), k)

    return te.compute((*x.shape[:-1], rows), dot, "matmul")


def _take(packed: te.Tensor, ids: te.Tensor) -> te.Tensor:
    panel = packed.shape[2]

    def row(n: tirx.Var, k: tirx.Var) -> tirx.Expr:
        return packed(tirx.floordiv(ids(n), panel), k, tirx.floormod(ids(n), panel))

    return te.compute((ids.shape[0], packed.shape[1]), row, "take")


def _pack(weight: te.Tensor, panel: int) -> te.Tensor:
    rows, columns = weight.shape

    def element(p: tirx.Var, k: tirx.Var, n: tirx.Var) -> tirx.Expr:
        row = p * panel + n
        return tirx.if_then_else(row < rows, weight(row, k), tirx.const(0, "float32"))

    return te.compute((tirx.floordiv(rows + panel - 1, panel), columns, panel), element, "pack")
