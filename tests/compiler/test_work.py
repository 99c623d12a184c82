"""What kernels compute and move, counted by hand."""

# The kernels are TVMScript.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.script import tirx as T  # noqa: N812

from serve.backends import get_backend
from serve.compiler.arguments import work_of
from serve.compiler.pipeline import fuse
from serve.compiler.work import count_work
from serve.model.kv_pages import append_kernel, attend_kernel

pytestmark = pytest.mark.compiler

Counted = tuple[int | None, ...]  # FLOP, bytes read, bytes written
ROWS = 10


def work_in(forward: Any, specs: list[Any], *arguments: Any) -> Counted:
    """Of the one kernel that a model of this method `forward` is fused to."""
    _, *names = inspect.signature(forward).parameters  # the first is the model itself
    spec = dict(zip(names, specs, strict=True))
    model = type("Model", (nn.Module,), {"forward": forward})()
    with tvm.target.Target(get_backend("cpu").target()):
        mod, _ = model.export_tvm(
            spec={"forward": spec | {"$": {"param_mode": "none", "effect_mode": "none"}}}
        )
        functions = fuse(mod).functions_items()
    [(name, kernel)] = [(v.name_hint, f) for v, f in functions if isinstance(f, tirx.PrimFunc)]
    return counted(kernel, *arguments, name=name)


def counted(kernel: Any, *arguments: Any, name: str = "main") -> Counted:
    return work_of(count_work(name, kernel), arguments)


def f32(*shape: Any) -> Any:
    return nn.spec.Tensor(list(shape), "float32")


def tensor(*shape: int) -> tuple[tuple[int, ...], None]:
    return shape, None


def test_a_product_with_bias() -> None:
    found = work_in(
        lambda _, x, w, b: op.matmul(x, op.permute_dims(w)) + b,
        [f32("n", 64), f32(48, 64), f32(48)],
        tensor(ROWS, 64), tensor(48, 64), tensor(48), tensor(ROWS, 48),
    )  # fmt: skip
    flop = 2 * ROWS * 64 * 48 + ROWS * 48
    assert found == (flop, 4 * (ROWS * 64 + 48 * 64 + 48), 4 * ROWS * 48)


def test_layer_norm() -> None:
    """Mean: D + 1; variance: 4 D; each element: 7, rsqrt(variance / D + epsilon) among them."""
    found = work_in(
        lambda _, x, g, b: op.layer_norm(x, 64, g, b),
        [f32("n", 64), f32(64), f32(64)],
        tensor(ROWS, 64), tensor(64), tensor(64), tensor(ROWS, 64),
    )  # fmt: skip
    assert found == (ROWS * (65 + 4 * 64 + 7 * 64), 4 * (ROWS * 64 + 128), 4 * ROWS * 64)


def test_gelu() -> None:
    """0.5 x (1 + tanh(0.80 x (1 + 0.045 x x))): six products, two sums, and tanh."""
    found = work_in(
        lambda _, x: op.gelu(x, approximate="tanh"),
        [f32("n", 64)],
        tensor(ROWS, 64),
        tensor(ROWS, 64),
    )
    assert found == (9 * ROWS * 64, 4 * ROWS * 64, 4 * ROWS * 64)


def test_a_gather_reads_what_it_takes() -> None:
    ids = nn.spec.Tensor(["n"], "int32")
    arguments = (tensor(1000, 64), tensor(ROWS), tensor(ROWS, 64))
    found = work_in(lambda _, w, i: op.take(w, i, axis=0), [f32(1000, 64), ids], *arguments)
    assert found == (0, 4 * ROWS * 64 + 4 * ROWS, 4 * ROWS * 64)
    arguments = (tensor(4, 64), tensor(ROWS), tensor(ROWS, 64))
    found = work_in(lambda _, w, i: op.take(w, i, axis=0), [f32(4, 64), ids], *arguments)
    assert found == (0, 4 * 4 * 64 + 4 * ROWS, 4 * ROWS * 64)  # no more than there is


def test_lengths_are_data() -> None:
    """Sums of rows of different lengths; a row's first value is not read from the output."""

    @T.prim_func(s_tir=True)
    def sums(x_: T.handle, begins_: T.handle, out_: T.handle):
        n, rows = T.int32(), T.int32()
        x = T.match_buffer(x_, (n,), "float32")
        begins = T.match_buffer(begins_, (rows + 1,), "int32")
        out = T.match_buffer(out_, (rows,), "float32")
        for row in T.serial(rows):
            out[row] = T.float32(0)
            for i in T.serial(begins[row + 1] - begins[row]):
                out[row] = out[row] + x[begins[row] + i]

    begins = np.array([0, 3, 3, 10], np.int32)
    arguments = (tensor(100), ((4,), begins), tensor(3))
    assert counted(sums, *arguments) == (10, 4 * 10 + 4 * 4, 4 * 3)


def test_in_place_is_read_and_written() -> None:
    @T.prim_func(s_tir=True)
    def add(x_: T.handle, y_: T.handle):
        n = T.int32()
        x = T.match_buffer(x_, (n,), "float32")
        y = T.match_buffer(y_, (n,), "float32")
        for i in T.serial(n):
            x[i] = x[i] + y[i]

    assert counted(add, tensor(50), tensor(50)) == (50, 400, 200)


def test_conditions() -> None:
    """On an argument: the branch taken. On floats: the dearer one."""

    @T.prim_func(s_tir=True)
    def scaled(x_: T.handle, y_: T.handle, twice: T.int32):
        n = T.int32()
        x = T.match_buffer(x_, (n,), "float32")
        y = T.match_buffer(y_, (n,), "float32")
        for i in T.serial(n):
            if twice > 0:
                y[i] = x[i] * T.float32(2) + T.float32(1)
            else:
                y[i] = T.if_then_else(x[i] > T.float32(0), T.exp(x[i]) - T.float32(1), x[i])

    assert counted(scaled, tensor(50), tensor(50), 1)[0] == 100
    assert counted(scaled, tensor(50), tensor(50), 0)[0] == 100
    assert count_work("main", scaled)["flop"] == "n*where(((twice) > (0)), 2, max(2, 0))"


def test_an_integer_that_a_loop_makes_is_not_taken_for_its_first_value() -> None:
    @T.prim_func(s_tir=True)
    def doubled(x_: T.handle, steps: T.int32):
        x = T.match_buffer(x_, (100,), "float32")
        n = T.alloc_buffer((1,), "int32", scope="local")
        n[0] = 1
        for _ in T.serial(steps):
            n[0] = n[0] * 2
        for i in T.serial(n[0]):
            x[i] = x[i] + T.float32(1)

    assert count_work("main", doubled)["flop"] is None


def test_what_cannot_be_counted_says_so() -> None:
    @T.prim_func(s_tir=True)
    def halved(x_: T.handle):
        x = T.match_buffer(x_, (1,), "float32")
        while x[0] > T.float32(1):
            x[0] = x[0] * T.float32(0.5)

    work = count_work("main", halved)
    assert (work["flop"], work["bytes_read"], work["bytes_written"]) == (None, None, None)
    assert work["uncounted"] == "While"


# What attention is, by hand: 4 heads 16 wide, 2 sequences of 3 and 5 queries, nothing before them.
PAIRS = 3 * 4 // 2 + 5 * 6 // 2
ATTENTION = 4 * (PAIRS * (4 * 16 + 5) + 8 * 16)


def cache_kernel(name: str) -> Any:
    """One of those that TVM's KV cache gets, of TVM's own."""
    from tvm.relax.frontend.nn.llm import kv_cache as tvm_cache

    make = {
        "batch_prefill_ragged_kv": lambda: tvm_cache._attention_prefill_ragged_cpu(
            4, 4, 16, 16, "float32", {}
        ),
        "batch_decode_paged_kv_cpu": lambda: tvm_cache._attention_decode_cpu(
            4, 4, 16, "float32", False, {}
        ),
    }
    return make[name]()


def test_attention_of_a_prompt() -> None:
    name = "batch_prefill_ragged_kv"
    begins = ((3,), np.array([0, 3, 8], np.int32))
    rows = tensor(8, 4, 16)
    arguments = (rows, begins, rows, rows, begins, tensor(8), tensor(2), rows, tensor(8, 4), 1, 0)
    flop, _, written = counted(cache_kernel(name), *arguments, name=name)
    assert flop == ATTENTION
    assert written == 4 * (8 * 4 * 16 + 8 * 4)


def test_attention_over_pages() -> None:
    """One query of each of two sequences, with 20 and 7 keys in pages of 16."""
    name = "batch_decode_paged_kv_cpu"
    arguments = (
        tensor(2, 4, 16), tensor(100, 2, 4, 16, 16), ((3,), np.array([0, 2, 3])), ((3,), None),
        ((2,), np.array([4, 7])), tensor(2), tensor(2), tensor(2, 4, 16), tensor(2, 4), 0,
    )  # fmt: skip
    flop, read, _ = counted(cache_kernel(name), *arguments, name=name)
    assert flop == 4 * (27 * (4 * 16 + 5) + 2 * 16)
    keys_and_values, query = 4 * 27 * 2 * 4 * 16, 4 * 2 * 4 * 16
    assert read == keys_and_values + query + 4 * (3 + 3 + 2)


def test_attention_over_pages_of_our_own() -> None:
    """Prompts of 3 and 5 tokens, each in one page; the other layers' pages are not read."""
    positions = ((8,), np.array([0, 1, 2, 0, 1, 2, 3, 4]))
    starts, numbers = ((8,), np.array([0] * 3 + [1] * 5)), ((2,), np.array([7, 9]))
    pages = tensor(12, 100, 4, 16, 16)
    tables = (positions, starts, numbers, 0)
    name = "kv_pages_attend"
    arguments = (tensor(8, 12, 16), pages, pages, *tables, 0.25, tensor(8, 4, 16))
    flop, read, written = counted(attend_kernel(4, 16), *arguments, name=name)
    assert flop == ATTENTION
    queries, two_pages = 4 * 8 * 4 * 16, 4 * 2 * 2 * 4 * 16 * 16
    assert read == queries + min(two_pages, 4 * 2 * PAIRS * 4 * 16) + 4 * (8 + 8 + 2)
    assert written == queries
    append = counted(append_kernel(4, 16), tensor(8, 12, 16), pages, pages, *tables)
    keys_and_values = 2 * queries
    assert append == (0, keys_and_values + 4 * (8 + 8 + 2), keys_and_values)
