"""cpu.attention: attention over KV pages of our own (serve/model/kv_pages.py). Imports TVM.

Kernels of the same signature in place of the model's plain loops: threads over heads and tiles of
rows, vectors over the keys of a page and over the width of its values.

A row's arithmetic is the same wherever it is computed. It takes in its keys, from position 0 on, in
groups, one step of the online softmax (in base 2) for each group: scores are sums over the width
in order, and a row's weighted values are summed key by key. Rows of one sequence are computed
together, where there are enough, so that they share the loads of keys and values; a row then meets
keys that the causal mask hides from it, whose weight is 0.
"""

# The kernels are TVMScript: shapes in capitals, lambdas used at once.
# ruff: noqa: N803, N806, B023
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import math

from tvm import s_tir, tirx
from tvm.script import tirx as T  # noqa: N812
from tvm.target import Target

from profiles.cpu.rule import CPURule, Declined
from profiles.cpu.target import lanes, registers
from profiles.cpu.vector_math import exp2

APPEND, ATTEND = "kv_pages_append", "kv_pages_attend"
PAGE = 16  # keys in a page
FEW_ROWS = 8  # tokens that are appended without threads
LOG2_E = math.log2(math.e)


class Attention(CPURule):
    """Takes the two kernels of our KV pages, told by name and shapes.

    rows: in a tile, at most: more would leave more at a sequence's end to be computed singly.
    group: keys in a step of the online softmax. Declines head widths that no power of two from 4 on
    divides.
    """

    def __init__(self, rows: int = 8, group: int = 64) -> None:
        self.rows, self.group = rows, group

    takes_scheduled = True  # the model marks them, so that no other rule tries its luck

    def schedule(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule:
        name = str(func.attrs.get("global_symbol", "")) if func.attrs else ""
        if name not in (APPEND, ATTEND):
            raise Declined("it is not attention over KV pages")
        heads, width = _heads(func)
        if math.gcd(width, PAGE) < 4:
            raise Declined(f"no power of two from 4 on divides its head width, {width}")
        if name == ATTEND:
            room = registers(target) * lanes(target) // (2 * PAGE)
            kernel = _attend(heads, width, min(self.rows, room), self.group, target)
        else:
            kernel = _append(heads, width)
        return s_tir.Schedule(kernel.with_attr("global_symbol", name))


def _heads(func: tirx.PrimFunc) -> tuple[int, int]:
    """The number of heads and their width. Raises Declined."""
    qkv, keys, values = (param.ty for param in func.params[:3])
    heads, width, _ = (int(extent) for extent in keys.shape[2:])
    expected = (
        (qkv, [3 * heads, width], 1),
        (keys, [heads, width, PAGE], 2),
        (values, [heads, PAGE, width], 2),
    )
    for tensor, shape, begin in expected:
        if str(tensor.dtype) != "float32" or [int(n) for n in tensor.shape[begin:]] != shape:
            raise Declined(f"a tensor of it is not float32 of shape {shape}")
    return heads, width


@T.macro
def _fold(buffer, r, combine):
    """A row's 16 lanes into its first, by halves."""
    for x in T.vectorized(8):
        buffer[r, x] = combine(buffer[r, x], buffer[r, x + 8])
    for x in T.vectorized(4):
        buffer[r, x] = combine(buffer[r, x], buffer[r, x + 4])
    for x in T.vectorized(2):
        buffer[r, x] = combine(buffer[r, x], buffer[r, x + 2])
    buffer[r, 0] = combine(buffer[r, 0], buffer[r, 1])


@T.macro
def _score(rows, visible, key, queries, scores, at, width):
    """scores[r, at …]: the rows with a page's keys; row r sees the page's first visible + r + 1."""
    sums = T.alloc_buffer((rows, PAGE), "float32", scope="local")
    for r in T.unroll(rows):
        for x in T.vectorized(PAGE):
            sums[r, x] = T.float32(0)
    for d in T.serial(width):
        for r in T.unroll(rows):
            for x in T.vectorized(PAGE):
                sums[r, x] = T.fma(queries[d, r], key(d, x), sums[r, x])
    for r in T.unroll(rows):
        for x in T.vectorized(PAGE):
            scores[r, at + x] = T.Select(x <= visible + r, sums[r, x], T.float32(-math.inf))


@T.macro
def _softmax(r, num_pages, weights, totals, highest, ratio):
    """Scores to weights relative to the highest score so far; what came before shrinks by ratio."""
    peak = T.alloc_buffer((1, PAGE), "float32", scope="local")
    part = T.alloc_buffer((PAGE,), "float32", scope="local")
    for x in T.vectorized(PAGE):
        peak[0, x] = highest[r]
        part[x] = T.float32(0)
    for p in T.serial(num_pages):
        for x in T.vectorized(PAGE):
            peak[0, x] = T.max(peak[0, x], weights[r, p * PAGE + x])
    _fold(peak, 0, lambda a, b: T.max(a, b))
    ratio[r] = exp2(highest[r] - peak[0, 0])
    highest[r] = peak[0, 0]
    for p in T.serial(num_pages):
        for x in T.vectorized(PAGE):
            weights[r, p * PAGE + x] = exp2(weights[r, p * PAGE + x] - highest[r])
        for x in T.vectorized(PAGE):
            part[x] = part[x] + weights[r, p * PAGE + x]
    for x in T.vectorized(PAGE):
        totals[r, x] = T.fma(totals[r, x], ratio[r], part[x])


@T.macro
def _weigh(rows, num_keys, number, value, weights, weighted, at, ratio, chunk, chunks):
    """weighted[r, at …]: the sums of so many chunks of values take in the next keys'."""
    sums = T.alloc_buffer((rows, chunks, chunk), "float32", scope="local")
    for r in T.unroll(rows):
        for c in T.unroll(chunks):
            for x in T.vectorized(chunk):
                sums[r, c, x] = weighted[r, at + c * chunk + x] * ratio[r]
    for p in T.serial((num_keys + PAGE - 1) // PAGE):
        page: T.let[T.int32] = number(p)
        for j in T.serial(T.min(PAGE, num_keys - p * PAGE)):
            for r in T.unroll(rows):
                for c in T.unroll(chunks):
                    for x in T.vectorized(chunk):
                        sums[r, c, x] = T.fma(
                            weights[r, p * PAGE + j], value(page, j, c * chunk + x), sums[r, c, x]
                        )
    for r in T.unroll(rows):
        for c in T.unroll(chunks):
            for x in T.vectorized(chunk):
                weighted[r, at + c * chunk + x] = sums[r, c, x]


@T.macro
def _tile(rows, GROUP, position, query, number, key, value, out, first, head, width, chunk, chunks):
    """So many rows of one sequence, from `position` on, to out[first …, head]."""
    queries = T.alloc_buffer((width, rows), "float32", scope="local")
    weights = T.alloc_buffer((rows, GROUP), "float32", scope="local")  # scores at first
    weighted = T.alloc_buffer((rows, width), "float32", scope="local")  # sums of values
    totals = T.alloc_buffer((rows, PAGE), "float32", scope="local")  # sums of weights, by lane
    highest = T.alloc_buffer((rows,), "float32", scope="local")
    ratio = T.alloc_buffer((rows,), "float32", scope="local")
    for r in T.serial(rows):
        highest[r] = T.float32(-math.inf)
        for d in T.serial(width):
            queries[d, r] = query(r, d)
        for x in T.vectorized(PAGE):
            totals[r, x] = T.float32(0)
        for c in T.serial(width // chunk):
            for x in T.vectorized(chunk):
                weighted[r, c * chunk + x] = T.float32(0)
    for group in T.serial((position + rows + GROUP - 1) // GROUP):
        begin: T.let[T.int32] = group * GROUP
        num_keys: T.let[T.int32] = T.min(GROUP, position + rows - begin)
        for p in T.serial((num_keys + PAGE - 1) // PAGE):
            page: T.let[T.int32] = number(begin // PAGE + p)
            _score(
                rows,
                position - begin - p * PAGE,
                lambda d, x: key(page, d, x),
                queries,
                weights,
                p * PAGE,
                width,
            )
        for r in T.serial(rows):
            _softmax(r, (num_keys + PAGE - 1) // PAGE, weights, totals, highest, ratio)
        for c in T.serial(width // (chunk * chunks)):
            _weigh(
                rows,
                num_keys,
                lambda p: number(begin // PAGE + p),
                lambda page, j, k: value(page, j, c * chunk * chunks + k),
                weights,
                weighted,
                c * chunk * chunks,
                ratio,
                chunk,
                chunks,
            )
    for r in T.serial(rows):
        _fold(totals, r, lambda a, b: a + b)
        for c in T.serial(width // chunk):
            for x in T.vectorized(chunk):
                out[first + r, head, c * chunk + x] = weighted[r, c * chunk + x] / totals[r, 0]


@T.macro
def _rows(
    rows,
    GROUP,
    first,
    head,
    layer,
    scale,
    qkv,
    keys,
    values,
    positions,
    starts,
    numbers,
    out,
    width,
    chunk,
    chunks,
):
    """A tile of the kernel's tensors: rows first …, of one sequence."""
    _tile(
        rows,
        GROUP,
        positions[first],
        lambda r, d: qkv[first + r, head, d] * (scale * T.float32(LOG2_E)),
        lambda p: numbers[starts[first] + p],
        lambda page, d, x: keys[layer, page, head, d, x],
        lambda page, j, d: values[layer, page, head, j, d],
        out,
        first,
        head,
        width,
        chunk,
        chunks,
    )


@T.macro
def _append_head(M, H, D, qkv, keys, values, positions, starts, numbers, layer, head):
    """One head of every token, token by token: a page stays in cache until it is filled."""
    for row in T.serial(M):
        page: T.let[T.int32] = numbers[starts[row] + positions[row] // PAGE]
        slot: T.let[T.int32] = positions[row] % PAGE
        for d in T.serial(D):
            keys[layer, page, head, d, slot] = qkv[row, H + head, d]
        for c in T.serial(D // math.gcd(D, PAGE)):
            for x in T.vectorized(math.gcd(D, PAGE)):
                values[layer, page, head, slot, c * math.gcd(D, PAGE) + x] = qkv[
                    row, 2 * H + head, c * math.gcd(D, PAGE) + x
                ]


def _append(H: int, D: int) -> tirx.PrimFunc:
    """Threads over heads, unless starting them takes longer than the few tokens do."""

    @T.prim_func(s_tir=True)
    def append(
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
        keys = T.match_buffer(keys_, (L, P, H, D, PAGE), "float32")
        values = T.match_buffer(values_, (L, P, H, PAGE, D), "float32")
        positions = T.match_buffer(positions_, (M,), "int32")
        starts = T.match_buffer(starts_, (M,), "int32")
        numbers = T.match_buffer(numbers_, (N,), "int32")
        if M < FEW_ROWS:
            for head in T.serial(H):
                _append_head(M, H, D, qkv, keys, values, positions, starts, numbers, layer, head)
        else:
            for head in T.parallel(H):
                _append_head(M, H, D, qkv, keys, values, positions, starts, numbers, layer, head)

    return append


def _attend(H: int, D: int, ROWS: int, GROUP: int, target: Target) -> tirx.PrimFunc:
    """Threads over heads and tiles of rows; a tile of several sequences row by row."""
    CHUNK = math.gcd(D, PAGE)

    def chunks(rows: int) -> int:
        """Vectors of a row's values at a time: half of the registers for all sums of the tile."""
        count = D // CHUNK
        room = registers(target) * lanes(target) // (2 * rows * CHUNK)
        return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(1, room))

    @T.prim_func(s_tir=True)
    def attend(
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
        keys = T.match_buffer(keys_, (L, P, H, D, PAGE), "float32")
        values = T.match_buffer(values_, (L, P, H, PAGE, D), "float32")
        positions = T.match_buffer(positions_, (M,), "int32")
        starts = T.match_buffer(starts_, (M,), "int32")
        numbers = T.match_buffer(numbers_, (N,), "int32")
        out = T.match_buffer(out_, (M, H, D), "float32")
        num_tiles: T.let[T.int64] = (M + ROWS - 1) // ROWS
        for i in T.parallel(H * num_tiles):
            head: T.let[T.int64] = i // num_tiles
            turn: T.let[T.int64] = i % num_tiles
            # First, last, second, second to last …: later tiles cost more, and threads take runs.
            tile: T.let[T.int64] = T.if_then_else(
                turn % 2 == 0, turn // 2, num_tiles - 1 - turn // 2
            )
            first: T.let[T.int64] = tile * ROWS
            if first + ROWS <= M and starts[first] == starts[T.min(first + ROWS, M) - 1]:
                _rows(
                    ROWS,
                    GROUP,
                    first,
                    head,
                    layer,
                    scale,
                    qkv,
                    keys,
                    values,
                    positions,
                    starts,
                    numbers,
                    out,
                    D,
                    CHUNK,
                    chunks(ROWS),
                )
            else:
                for row in T.serial(first, T.min(first + ROWS, M)):
                    _rows(
                        1,
                        GROUP,
                        row,
                        head,
                        layer,
                        scale,
                        qkv,
                        keys,
                        values,
                        positions,
                        starts,
                        numbers,
                        out,
                        D,
                        CHUNK,
                        chunks(1),
                    )

    return attend
