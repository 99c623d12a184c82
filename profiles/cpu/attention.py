"""cpu.attention: decode and prefill over the paged KV cache. Imports TVM.

Kernels of the same signature in place of TVM's own for the CPU, which are scalar loops on one
thread: threads over heads, vectors over a head's width, 16 keys at a time, and no look at keys that
the causal mask hides. Softmax is the online one, in base 2, as TVM's merge of partial results needs
it: lse is a base-2 logarithm.
"""

# The kernels are TVMScript: shapes in capitals, parameters they must take, lambdas used at once.
# ruff: noqa: N803, N806, ARG001, B023
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import math

from tvm import s_tir, tirx
from tvm.s_tir.dlight.base import ScheduleRule
from tvm.script import tirx as T  # noqa: N812
from tvm.target import Target

GROUP = 16  # keys at a time; and the page size of TVM's kernels for the CPU
LOG2_E = math.log2(math.e)
NO_SCORE = -5e4  # where TVM's kernels begin: what is left of it after the first key is 0


class Attention(ScheduleRule):  # type: ignore[misc]
    """Takes TVM's three kernels of plain multi-head attention, told by name and shapes.

    Declines sliding windows and trees (other names), grouped queries, types other than f32, pages
    of another size, and head widths that no power of two from 4 on divides. The kernels assert at
    run time that no rotary embedding is asked for.
    """

    takes_scheduled = True  # TVM marks its decode kernel as scheduled

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        if target.kind.name != "llvm" or not isinstance(func, tirx.PrimFunc):
            return None
        name = str(func.attrs.get("global_symbol", "")) if func.attrs else ""
        heads = _heads(func) if name in KERNELS else None
        if heads is None:
            return None
        return s_tir.Schedule(KERNELS[name](*heads).with_attr("global_symbol", name))


def _heads(func: tirx.PrimFunc) -> tuple[int, int] | None:
    """The number of heads and their width, if the kernels fit."""
    tensors = [p.ty for p in func.params if len(getattr(p.ty, "shape", ())) > 2]
    if any(str(tensor.dtype) != "float32" for tensor in tensors):
        return None
    inner = [[int(extent) for extent in tensor.shape[1:]] for tensor in tensors]
    heads, width = inner[0]
    if any(shape not in ([heads, width], [2, heads, GROUP, width]) for shape in inner):
        return None
    return (heads, width) if math.gcd(width, 16) >= 4 else None


@T.macro
def _begin(o, state, width, lanes):
    """o: sum of weighted values; state: highest score, sum of weights, next highest, its ratio."""
    state[0] = T.float32(NO_SCORE)
    state[1] = T.float32(1)
    for c in T.unroll(width // lanes):
        for x in T.vectorized(lanes):
            o[c * lanes + x] = T.float32(0)


@T.macro
def _score(query, key, j, scores, sums, state, scale, width, lanes):
    """scores[j] = query . key, and the highest so far."""
    for x in T.vectorized(lanes):
        sums[x] = T.float32(0)
    for c in T.unroll(width // lanes):
        for x in T.vectorized(lanes):
            sums[x] = sums[x] + query(c * lanes + x) * key(j, c * lanes + x)
    scores[j] = T.float32(0)
    for x in T.unroll(lanes):
        scores[j] = scores[j] + sums[x]
    scores[j] = scores[j] * (scale * T.float32(LOG2_E))
    state[2] = T.max(state[2], scores[j])


@T.macro
def _group(n, query, key, value, o, scores, sums, state, scale, width, lanes):
    """Take in the next n <= GROUP keys."""
    state[2] = state[0]
    for j in T.serial(n):
        _score(query, key, j, scores, sums, state, scale, width, lanes)
    state[3] = T.exp2(state[0] - state[2])
    state[0] = state[2]
    state[1] = state[1] * state[3]
    for c in T.unroll(width // lanes):
        for x in T.vectorized(lanes):
            o[c * lanes + x] = o[c * lanes + x] * state[3]
    for j in T.serial(n):
        scores[j] = T.exp2(scores[j] - state[0])
        state[1] = state[1] + scores[j]
        for c in T.unroll(width // lanes):
            for x in T.vectorized(lanes):
                o[c * lanes + x] = o[c * lanes + x] + scores[j] * value(j, c * lanes + x)


@T.macro
def _end(o, state, out, lse, row, head, width, lanes):
    for c in T.unroll(width // lanes):
        for x in T.vectorized(lanes):
            out[row, head, c * lanes + x] = o[c * lanes + x] / state[1]
    lse[row, head] = state[0] + T.log2(state[1])


def _decode(H: int, D: int) -> tirx.PrimFunc:
    """One query a sequence against all its pages."""
    lanes = math.gcd(D, 16)

    @T.prim_func(s_tir=True)
    def decode(
        q_: T.handle,
        pages_: T.handle,
        indptr_: T.handle,
        numbers_: T.handle,
        last_length_: T.handle,
        k_position_: T.handle,
        q_position_: T.handle,
        out_: T.handle,
        lse_: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        B, N, P = T.int32(), T.int32(), T.int32()
        at1, at2, at3, at4, at5 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (B, H, D), "float32")
        pages = T.match_buffer(pages_, (P, 2, H, GROUP, D), "float32")
        indptr = T.match_buffer(indptr_, (B + 1,), "int32", elem_offset=at1)
        numbers = T.match_buffer(numbers_, (N,), "int32", elem_offset=at2)
        last_length = T.match_buffer(last_length_, (B,), "int32", elem_offset=at3)
        T.match_buffer(k_position_, (B,), "int32", elem_offset=at4)
        T.match_buffer(q_position_, (B,), "int32", elem_offset=at5)
        out = T.match_buffer(out_, (B, H, D), "float32")
        lse = T.match_buffer(lse_, (B, H), "float32")
        assert rotary_mode == 0, "cpu.attention has no rotary embedding"
        for i in T.parallel(B * H):
            o = T.alloc_buffer((D,), "float32", scope="local")
            scores = T.alloc_buffer((GROUP,), "float32", scope="local")
            sums = T.alloc_buffer((lanes,), "float32", scope="local")
            state = T.alloc_buffer((4,), "float32", scope="local")
            b: T.let[T.int32] = i // H
            h: T.let[T.int32] = i % H
            _begin(o, state, D, lanes)
            for page in T.serial(indptr[b + 1] - indptr[b]):
                number: T.let[T.int32] = numbers[indptr[b] + page]
                is_last: T.let[T.bool] = page + 1 == indptr[b + 1] - indptr[b]
                _group(
                    T.if_then_else(is_last, last_length[b], GROUP),
                    lambda d: q[b, h, d],
                    lambda j, d: pages[number, 0, h, j, d],
                    lambda j, d: pages[number, 1, h, j, d],
                    o,
                    scores,
                    sums,
                    state,
                    sm_scale,
                    D,
                    lanes,
                )
            _end(o, state, out, lse, b, h, D, lanes)

    return decode


def _paged_prefill(H: int, D: int) -> tirx.PrimFunc:
    """Each sequence's queries against its pages."""
    lanes = math.gcd(D, 16)

    @T.prim_func(s_tir=True)
    def paged_prefill(
        q_: T.handle,
        q_indptr_: T.handle,
        pages_: T.handle,
        indptr_: T.handle,
        numbers_: T.handle,
        last_length_: T.handle,
        k_position_: T.handle,
        q_position_: T.handle,
        out_: T.handle,
        lse_: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        B, M, N, P = T.int32(), T.int32(), T.int32(), T.int32()
        at1, at2, at3 = T.int32(), T.int32(), T.int32()
        at4, at5, at6 = T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (M, H, D), "float32")
        q_indptr = T.match_buffer(q_indptr_, (B + 1,), "int32", elem_offset=at1)
        pages = T.match_buffer(pages_, (P, 2, H, GROUP, D), "float32")
        indptr = T.match_buffer(indptr_, (B + 1,), "int32", elem_offset=at2)
        numbers = T.match_buffer(numbers_, (N,), "int32", elem_offset=at3)
        last_length = T.match_buffer(last_length_, (B,), "int32", elem_offset=at4)
        T.match_buffer(k_position_, (B,), "int32", elem_offset=at5)
        T.match_buffer(q_position_, (M,), "int32", elem_offset=at6)
        out = T.match_buffer(out_, (M, H, D), "float32")
        lse = T.match_buffer(lse_, (M, H), "float32")
        assert rotary_mode == 0, "cpu.attention has no rotary embedding"
        for b in T.serial(B):
            num_queries: T.let[T.int32] = q_indptr[b + 1] - q_indptr[b]
            num_pages: T.let[T.int32] = indptr[b + 1] - indptr[b]
            num_keys: T.let[T.int32] = T.if_then_else(
                num_pages > 0, (num_pages - 1) * GROUP + last_length[b], 0
            )
            for i in T.parallel(num_queries * H):
                o = T.alloc_buffer((D,), "float32", scope="local")
                scores = T.alloc_buffer((GROUP,), "float32", scope="local")
                sums = T.alloc_buffer((lanes,), "float32", scope="local")
                state = T.alloc_buffer((4,), "float32", scope="local")
                h: T.let[T.int32] = i // num_queries
                row: T.let[T.int32] = q_indptr[b] + i % num_queries
                visible: T.let[T.int32] = T.if_then_else(
                    causal > 0, num_keys - num_queries + i % num_queries + 1, num_keys
                )
                _begin(o, state, D, lanes)
                for page in T.serial((visible + GROUP - 1) // GROUP):
                    number: T.let[T.int32] = numbers[indptr[b] + page]
                    _group(
                        T.min(GROUP, visible - page * GROUP),
                        lambda d: q[row, h, d],
                        lambda j, d: pages[number, 0, h, j, d],
                        lambda j, d: pages[number, 1, h, j, d],
                        o,
                        scores,
                        sums,
                        state,
                        sm_scale,
                        D,
                        lanes,
                    )
                _end(o, state, out, lse, row, h, D, lanes)

    return paged_prefill


def _ragged_prefill(H: int, D: int) -> tirx.PrimFunc:
    """Each sequence's queries against the keys that come with them, not yet in the cache."""
    lanes = math.gcd(D, 16)

    @T.prim_func(s_tir=True)
    def ragged_prefill(
        q_: T.handle,
        q_indptr_: T.handle,
        k_: T.handle,
        v_: T.handle,
        k_indptr_: T.handle,
        q_position_: T.handle,
        k_position_: T.handle,
        out_: T.handle,
        lse_: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        B, M, N = T.int32(), T.int32(), T.int32()
        at1, at2, at3, at4 = T.int32(), T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (M, H, D), "float32")
        q_indptr = T.match_buffer(q_indptr_, (B + 1,), "int32", elem_offset=at1)
        k = T.match_buffer(k_, (N, H, D), "float32")
        v = T.match_buffer(v_, (N, H, D), "float32")
        k_indptr = T.match_buffer(k_indptr_, (B + 1,), "int32", elem_offset=at2)
        T.match_buffer(q_position_, (M,), "int32", elem_offset=at3)
        T.match_buffer(k_position_, (B,), "int32", elem_offset=at4)
        out = T.match_buffer(out_, (M, H, D), "float32")
        lse = T.match_buffer(lse_, (M, H), "float32")
        assert rotary_mode == 0, "cpu.attention has no rotary embedding"
        for b in T.serial(B):
            num_queries: T.let[T.int32] = q_indptr[b + 1] - q_indptr[b]
            num_keys: T.let[T.int32] = k_indptr[b + 1] - k_indptr[b]
            for i in T.parallel(num_queries * H):
                o = T.alloc_buffer((D,), "float32", scope="local")
                scores = T.alloc_buffer((GROUP,), "float32", scope="local")
                sums = T.alloc_buffer((lanes,), "float32", scope="local")
                state = T.alloc_buffer((4,), "float32", scope="local")
                h: T.let[T.int32] = i // num_queries
                row: T.let[T.int32] = q_indptr[b] + i % num_queries
                visible: T.let[T.int32] = T.if_then_else(
                    causal > 0, num_keys - num_queries + i % num_queries + 1, num_keys
                )
                _begin(o, state, D, lanes)
                for group in T.serial((visible + GROUP - 1) // GROUP):
                    first: T.let[T.int32] = k_indptr[b] + group * GROUP
                    _group(
                        T.min(GROUP, visible - group * GROUP),
                        lambda d: q[row, h, d],
                        lambda j, d: k[first + j, h, d],
                        lambda j, d: v[first + j, h, d],
                        o,
                        scores,
                        sums,
                        state,
                        sm_scale,
                        D,
                        lanes,
                    )
                _end(o, state, out, lse, row, h, D, lanes)

    return ragged_prefill


KERNELS = {
    "batch_decode_paged_kv_cpu": _decode,
    "batch_prefill_paged_kv_cpu": _paged_prefill,
    "batch_prefill_ragged_kv": _ragged_prefill,
}
