"""cpu.elementwise: what numpy computes, of every shape and type."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi
from tvm.relax.frontend.nn import op
from tvm.script import tirx as T  # noqa: N812

from profiles.cpu.elementwise import Elementwise
from serve.model.layers import Embedding
from tests.compiler.conftest import CPUS, target_for
from tests.compiler.kernels import Array, Kernels, Loops, Of, packed, random

pytestmark = pytest.mark.compiler

RULE = "cpu.elementwise"
N, M = te.var("n", "int64"), te.var("m", "int64")


def placeholder(*shape: Any, dtype: str = "float32", name: str = "x") -> te.Tensor:
    return te.placeholder(shape, dtype, name)


def gelu(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return result


# name: in TE, in numpy (of float64), the type of the result
FUNCTIONS: dict[str, tuple[Callable[[te.Tensor], te.Tensor], Callable[[Array], Array], str]] = {
    "double": (lambda x: x + x, lambda x: x + x, "float32"),
    "tanh": (topi.tanh, np.tanh, "float32"),
    "exp": (topi.exp, np.exp, "float32"),
    "gelu": (
        lambda x: x * tirx.const(0.5, "float32")
        * (topi.erf(x * tirx.const(0.5**0.5, "float32")) + tirx.const(1, "float32")),
        gelu,
        "float32",
    ),
    "silu": (lambda x: x * topi.sigmoid(x), lambda x: x / (1 + np.exp(-x)), "float32"),
    "sine": (topi.sin, np.sin, "float32"),  # LLVM's own
    "is_positive": (lambda x: topi.greater(x, tirx.const(0, "float32")), lambda x: x > 0, "bool"),
    "int32": (lambda x: topi.cast(x, "int32"), np.trunc, "int32"),
    "int8": (lambda x: topi.cast(x, "int8"), np.trunc, "int8"),
    "float16": (lambda x: topi.cast(x, "float16"), lambda x: x.astype(np.float16), "float16"),
    "float64": (lambda x: topi.exp(topi.cast(x, "float64")), np.exp, "float64"),
}  # fmt: skip
SHAPES = [  # as declared, as given
    ((1,), (1,)),
    ((7,), (7,)),
    ((40,), (40,)),
    ((5, 1), (5, 1)),
    ((3, 16), (3, 16)),
    ((300, 77), (300, 77)),
    ((N,), (53,)),
    ((N, 33), (9, 33)),
    ((N, M), (4, 5)),
    ((N, 1, 7), (4, 1, 7)),
    ((1, N, M), (1, 3, 50)),
    ((2, 3, 4, 17), (2, 3, 4, 17)),
]


def check(name: str, loops: Loops, values: Array) -> None:
    _, in_numpy, dtype = FUNCTIONS[name]
    exact = in_numpy(values.astype(np.float64))
    found = loops.run(values, out=(values.shape, dtype))
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_allclose(
        found.astype(np.float64), exact.astype(np.float64), rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("declared", "given"), SHAPES, ids=str)
def test_functions(name: str, declared: tuple[Any, ...], given: tuple[int, ...]) -> None:
    x = placeholder(*declared)
    [values] = random(given)
    check(name, Loops(Elementwise(), x, FUNCTIONS[name][0](x)), 5 * values)


@pytest.mark.parametrize("cpu", CPUS[1:])
@pytest.mark.parametrize("name", ["gelu", "is_positive", "int8"])
def test_functions_elsewhere(name: str, cpu: str) -> None:
    x = placeholder(N, 45)
    [values] = random((6, 45))
    check(name, Loops(Elementwise(), x, FUNCTIONS[name][0](x), cpu=cpu), 5 * values)


def test_of_nothing_but_one_number() -> None:
    x = placeholder()
    check("tanh", Loops(Elementwise(), x, topi.tanh(x)), np.array(0.3, np.float32))


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    def look_up(width: int, panel: int | None) -> Callable[..., Any]:
        embedding = Embedding(101, width, panel)

        def forward(x0: Any, x1: Any) -> Any:
            embedding.weight = x0
            return embedding.forward(x1)

        return forward

    ids = Of(("n",), "int32")
    compiled = Kernels(
        {
            "gelu": (lambda x0: op.gelu(x0, approximate="tanh"), [("n", "m")]),
            "add": (lambda x0, x1: x0 + x1, [("n", "m"), ("n", "m")]),
            "broadcast": (lambda x0, x1: x0 * x1 + x1, [("n", "m"), ("m",)]),
            "take": (look_up(48, None), [(101, 48), ids]),
            "take_odd": (look_up(7, None), [(101, 7), ids]),
            "take_packed": (look_up(48, 16), [(7, 48, 16), ids]),
            "take_packed_odd": (look_up(7, 16), [(7, 7, 16), ids]),
            "take_rows": (lambda x0, x1: op.take(x0, x1, axis=1), [(1, "m", 48), ids]),
        },
        [RULE],
    )
    assert {rule for rules in compiled.rules.values() for rule in rules} == {RULE}
    return compiled


@pytest.mark.parametrize("length", [*range(1, 41), 255, 256, 257])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_length(kernels: Kernels, rows: int, length: int) -> None:
    """Of an unknown one, a tail of every size behind the vectors."""
    x, y, bias = random((rows, length), (rows, length), (length,))
    np.testing.assert_array_equal(kernels("add", x, y), x + y)
    np.testing.assert_allclose(kernels("broadcast", x, bias), x * bias + bias, atol=1e-6)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)
    np.testing.assert_allclose(kernels("gelu", x), 0.5 * x * (1 + np.tanh(inner)), atol=1e-6)


@pytest.mark.parametrize("num_ids", [1, 2, 33, 500])
def test_look_ups(kernels: Kernels, num_ids: int) -> None:
    ids = np.random.default_rng(num_ids).integers(0, 101, num_ids).astype(np.int32)
    ids[-1] = 100
    for name, width in (("take", 48), ("take_odd", 7)):
        [weight] = random((101, width))
        np.testing.assert_array_equal(kernels(name, weight, ids), weight[ids])
        in_panels = packed(weight, 16)
        found = kernels(name.replace("take", "take_packed"), in_panels, ids)
        np.testing.assert_array_equal(found, weight[ids])
    [hidden] = random((1, 101, 48))
    np.testing.assert_array_equal(kernels("take_rows", hidden, ids), hidden[:, ids])


def test_the_same_bits_on_any_number_of_threads(kernels: Kernels) -> None:
    configure = tvm.get_global_func("runtime.config_threadpool")
    [x] = random((900, 37))
    found = set()
    for num_threads in (1, 2, 2):
        configure(1, num_threads)
        found.add(kernels("gelu", x).tobytes())
    assert len(found) == 1


X, Y = placeholder(7, 33), placeholder(7, 17, name="y")
IDS = placeholder(5, dtype="int32", name="ids")
MOVES: dict[str, tuple[list[te.Tensor], Callable[..., Array]]] = {
    "transpose": ([X, topi.transpose(X)], lambda x: x.T),
    "reshape": ([X, topi.reshape(X, (33, 7))], lambda x: x.reshape(33, 7)),
    "concatenate": (
        [X, Y, topi.concatenate([X, Y], axis=1)],
        lambda x, y: np.concatenate([x, y], 1),
    ),
    "a_part": ([X, topi.split(X, 3, axis=1)[1]], lambda x: x[:, 11:22]),
    "columns": ([X, IDS, topi.take(X, IDS, axis=1)], lambda x, ids: x[:, ids]),
    "chain": (
        [X, topi.tanh(topi.transpose(X)) + tirx.const(1, "float32")],
        lambda x: np.tanh(x.T) + 1,
    ),
    "where": ([X, topi.where(topi.greater(X, 0.0), X, -X)], np.abs),
    "flip": ([X, topi.flip(X, axis=1)], lambda x: x[:, ::-1]),
    "pad": ([X, topi.nn.pad(X, [0, 2], [1, 3])], lambda x: np.pad(x, ((0, 1), (2, 3)))),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    tensors, in_numpy = MOVES[name]
    ids = np.array([32, 0, 6, 1, 1], np.int32)
    inputs = [ids if t.dtype == "int32" else random((7, int(t.shape[1])))[0] for t in tensors[:-1]]
    expected = in_numpy(*inputs)
    found = Loops(Elementwise(), *tensors).run(*inputs, out=(expected.shape, "float32"))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_of_no_input() -> None:
    found = Loops(Elementwise(), topi.arange(0, 37, 1, "int32")).run(out=((37,), "int32"))
    np.testing.assert_array_equal(found, np.arange(37))


MANY = "it is not a single loop nest without reduction"
DECLINED: dict[str, tuple[list[te.Tensor], str]] = {
    "sum": ([X, topi.sum(X, axis=1)], MANY),
    "max_of_all": ([X, topi.max(X)], MANY),
    "softmax": ([X, topi.nn.softmax(X)], MANY),
    "argmax": ([X, topi.argmax(X, axis=1)], "is more than one store"),
    "product": (
        (lambda w: [X, w, topi.matmul(X, w)])(placeholder(33, 16, name="w")),
        MANY,
    ),
    "two_outputs": ([X, topi.tanh(X), topi.exp(X)], "it has more than one output"),
    "every_part": ([X, *topi.split(X, 3, axis=1)], "it has more than one output"),
    "scan": ([X, topi.cumsum(X, axis=1)], "it is not a sequence of loop nests, one block in each"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_it_declines(name: str) -> None:
    tensors, reason = DECLINED[name]
    found = Loops(Elementwise(), *tensors).declined
    assert found is not None
    assert reason in found


def written(bounds: str, index: str, body: str) -> tirx.PrimFunc:
    return tvm.script.from_source(
        f"""
@T.prim_func(s_tir=True)
def main(x: T.Buffer((12,), "float32"), y: T.Buffer((12,), "float32")):
    for i in T.serial({bounds}):
        with T.sblock("f"):
            v = T.axis.{index}
            {body}
""",
        {"T": T},
    )


@pytest.mark.parametrize(
    ("bounds", "index", "body", "reason"),
    [
        ("12", "spatial(12, i)", "y[v] = x[v]", None),
        ("12", "spatial(12, i)", "y[v] = y[v] + x[v]", None),
        (
            "12",
            "spatial(12, i)",
            "T.where(i < 10)\n            y[v] = x[v]",
            "a loop nest leaves out elements, by a predicate",
        ),
        (
            "8",
            "spatial(12, i + 4)",
            "y[v] = x[v]",
            "it is not a sequence of loop nests, one block in each",
        ),
        (
            "1, 12",
            "opaque(12, i)",
            "y[v] = y[v - 1] + x[v]",
            "it is not a sequence of loop nests, one block in each",
        ),
    ],
    ids=range(5),
)
def test_what_only_looks_elementwise(
    bounds: str, index: str, body: str, reason: str | None
) -> None:
    func = written(bounds, index, body)
    assert Elementwise().why_not(func, target_for("here")) == reason
