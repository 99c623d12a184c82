"""KV pages of our own: attention whose arithmetic knows no batch, no chunks and no forks.

Stands in for TVM's PagedKVCache in the model. What TVM keeps in an object, these are tensors that
the library's functions take:

    keys       (layers, pages, heads, width, PAGE_SIZE) float32, updated in place
    values     (layers, pages, heads, PAGE_SIZE, width) float32, updated in place
    positions  (tokens,) int32: each token's position in its sequence
    starts     (tokens,) int32: where its sequence's page numbers begin in `numbers`
    numbers    (entries,) int32: the page numbers of one sequence after the other

A page's keys are stored by width: 16 scores are then a sum of vectors. A step's tokens first go
into their pages, then each looks at positions 0 to its own, in order, from the pages alone:
prefill, decode and a packed mixture of both are one kernel, and no partial results are merged.

The kernels here are written as they are meant, in plain loops. `cpu.attention` has fast ones.
"""

# The kernels are TVMScript: shapes in capitals.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T  # noqa: N812

from serve.model.config import GPT2Config

PAGE_SIZE = 16  # positions per KV page; TVM's CPU attention kernels are written for this size


class KVPages:
    """The two methods that the model uses of PagedKVCache, over tensors."""

    def __init__(
        self, keys: Tensor, values: Tensor, positions: Tensor, starts: Tensor, numbers: Tensor
    ) -> None:
        self._keys, self._values = keys, values
        self._positions, self._tables = positions, (positions, starts, numbers)

    def get_query_positions(self, total: Any) -> Tensor:
        """Each token's position, (total,) int32."""
        return op.reshape(self._positions, (total,))

    def attention_with_fused_qkv(
        self, layer: int, qkv: Tensor, num_heads: int, sm_scale: float
    ) -> Tensor:
        """(batch, length, 3 * heads, width) -> (batch, length, heads, width)."""
        batch, length, _, width = qkv.shape
        total = batch * length
        qkv = op.reshape(qkv, (total, 3 * num_heads, width))
        where = (*self._tables, tirx.IntImm("int64", layer))
        self._keys, self._values = op.tensor_ir_inplace_op(
            append_kernel(num_heads, width),
            "kv_pages_append",
            [qkv, self._keys, self._values, *where],
            inplace_indices=[1, 2],
            out=[self._keys, self._values],
        )
        out = op.tensor_ir_op(
            attend_kernel(num_heads, width),
            "kv_pages_attend",
            [qkv, self._keys, self._values, *where, tirx.FloatImm("float32", sm_scale)],
            out=Tensor.placeholder((total, num_heads, width), "float32"),
        )
        return op.reshape(out, (batch, length, num_heads, width))


def empty_pages(config: GPT2Config, num_pages: tirx.Var) -> tuple[Tensor, Tensor]:
    """Keys and values of so many pages; what is in them is undefined."""
    whole, heads, width = (config.n_layer, num_pages), config.n_head, config.head_dim
    keys = op.empty((*whole, heads, width, PAGE_SIZE), name="keys")
    return keys, op.empty((*whole, heads, PAGE_SIZE, width), name="values")


def spec(config: GPT2Config, tokens: str | int) -> list[nn.spec.Tensor]:
    """The arguments of a function over so many tokens."""
    heads, width = config.n_head, config.head_dim
    return [
        nn.spec.Tensor([config.n_layer, "pages", heads, width, PAGE_SIZE], "float32"),
        nn.spec.Tensor([config.n_layer, "pages", heads, PAGE_SIZE, width], "float32"),
        nn.spec.Tensor([tokens], "int32"),
        nn.spec.Tensor([tokens], "int32"),
        nn.spec.Tensor(["entries"], "int32"),
    ]


@cache
def append_kernel(H: int, D: int) -> tirx.PrimFunc:
    """Put each token's key and value into its page."""

    @T.prim_func(s_tir=True)
    def kv_pages_append(
        qkv_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        positions_: T.handle,
        starts_: T.handle,
        numbers_: T.handle,
        layer: T.int64,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        M, N, L, P = T.int64(), T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_, (M, 3 * H, D), "float32")
        keys = T.match_buffer(keys_, (L, P, H, D, PAGE_SIZE), "float32")
        values = T.match_buffer(values_, (L, P, H, PAGE_SIZE, D), "float32")
        positions = T.match_buffer(positions_, (M,), "int32")
        starts = T.match_buffer(starts_, (M,), "int32")
        numbers = T.match_buffer(numbers_, (N,), "int32")
        for row, h, d in T.grid(M, H, D):
            page: T.let[T.int32] = numbers[starts[row] + positions[row] // PAGE_SIZE]
            slot: T.let[T.int32] = positions[row] % PAGE_SIZE
            keys[layer, page, h, d, slot] = qkv[row, H + h, d]
            values[layer, page, h, slot, d] = qkv[row, 2 * H + h, d]

    return kv_pages_append


@cache
def attend_kernel(H: int, D: int) -> tirx.PrimFunc:
    """Softmax attention of each token to the positions up to its own."""

    @T.prim_func(s_tir=True)
    def kv_pages_attend(
        qkv_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        positions_: T.handle,
        starts_: T.handle,
        numbers_: T.handle,
        layer: T.int64,
        scale: T.float32,
        out_: T.handle,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        M, N, L, P = T.int64(), T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_, (M, 3 * H, D), "float32")
        keys = T.match_buffer(keys_, (L, P, H, D, PAGE_SIZE), "float32")
        values = T.match_buffer(values_, (L, P, H, PAGE_SIZE, D), "float32")
        positions = T.match_buffer(positions_, (M,), "int32")
        starts = T.match_buffer(starts_, (M,), "int32")
        numbers = T.match_buffer(numbers_, (N,), "int32")
        out = T.match_buffer(out_, (M, H, D), "float32")
        for row, h in T.grid(M, H):
            total = T.alloc_buffer((1,), "float32", scope="local")
            peak = T.alloc_buffer((2,), "float32", scope="local")  # so far, and with this key
            score = T.alloc_buffer((1,), "float32", scope="local")
            total[0] = T.float32(0)
            peak[0] = T.float32(-math.inf)
            for d in T.serial(D):
                out[row, h, d] = T.float32(0)
            for i in T.serial(positions[row] + 1):
                page: T.let[T.int32] = numbers[starts[row] + i // PAGE_SIZE]
                slot: T.let[T.int32] = i % PAGE_SIZE
                score[0] = T.float32(0)
                for d in T.serial(D):
                    score[0] = score[0] + qkv[row, h, d] * keys[layer, page, h, d, slot]
                score[0] = score[0] * scale
                peak[1] = T.max(peak[0], score[0])
                score[0] = T.exp(score[0] - peak[1])
                total[0] = total[0] * T.exp(peak[0] - peak[1]) + score[0]
                for d in T.serial(D):
                    out[row, h, d] = (
                        out[row, h, d] * T.exp(peak[0] - peak[1])
                        + score[0] * values[layer, page, h, slot, d]
                    )
                peak[0] = peak[1]
            for d in T.serial(D):
                out[row, h, d] = out[row, h, d] / total[0]

    return kv_pages_attend
