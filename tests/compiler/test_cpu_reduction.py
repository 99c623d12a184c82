"""cpu.reduction: what numpy computes in float64, each row the same bits in any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi
from tvm.relax.frontend.nn import op
from tvm.script import tirx as T  # noqa: N812

from profiles.cpu.reduction import Reduction
from tests.compiler.conftest import CPUS, target_for
from tests.compiler.kernels import Array, Inputs, Kernels, Loops, Shape, random

pytestmark = pytest.mark.compiler

RULE = "cpu.reduction"
N, M = te.var("n", "int64"), te.var("m", "int64")


def layer_norm(x: Array, scale: Array, shift: Array, eps: float) -> Array:
    x = x.astype(np.float64)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    result: Array = (x - mean) / np.sqrt(variance + eps) * scale + shift
    return result


def softmax(x: Array) -> Array:
    powers = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result


WIDTHS = [1, 2, 3, 7, 8, 16, 17, 48, 64, 100, 192, 768, 1280]
EPSILONS = [1e-5, 1e-3]
ROWS: dict[str, Shape] = {"one": (1, 1), "batch": ("n", 1), "packed": (1, "n"), "known": (3, 5)}


def norm_of(width: int, eps: float) -> Callable[..., Any]:
    return lambda x0, x1, x2: op.layer_norm(x0, [width], x1, x2, eps)


def norms_for(cpu: str, widths: list[int]) -> Kernels:
    functions: dict[str, tuple[Callable[..., Any], Inputs]] = {
        f"{rows}_{width}_{EPSILONS.index(eps)}": (
            norm_of(width, eps),
            [(*shape, width), (width,), (width,)],
        )
        for width in widths
        for rows, shape in ROWS.items()
        for eps in EPSILONS[: 2 if width == 48 else 1]
    }
    return Kernels(functions, [RULE], cpu=cpu)


@pytest.fixture(scope="module")
def norms() -> Kernels:
    return norms_for("here", WIDTHS)


def norm(
    kernels: Kernels, rows: str, x: Array, scale: Array, shift: Array, eps: float = 1e-5
) -> Array:
    """Of x as (rows, width)."""
    shape = {"one": (1, 1), "batch": (-1, 1), "packed": (1, -1), "known": (3, 5)}[rows]
    width = x.shape[-1]
    found = kernels(f"{rows}_{width}_{EPSILONS.index(eps)}", x.reshape(*shape, width), scale, shift)
    return found.reshape(-1, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(norms: Kernels, width: int) -> None:
    """Of numbers around another mean than 0, too."""
    x, scale, shift = random((45, width), (width,), (width,))
    x[9:20] += 30
    for eps in EPSILONS[: 2 if width == 48 else 1]:
        for rows, at in (("one", slice(0, 1)), ("batch", slice(1, 30)), ("known", slice(30, 45))):
            # Of a width of 1 there is no sum.
            expected = [None if width == 1 else RULE]
            assert norms.rules[f"{rows}_{width}_{EPSILONS.index(eps)}"] == expected
            found = norm(norms, rows, x[at], scale, shift, eps)
            exact = layer_norm(x[at], scale, shift, eps)
            np.testing.assert_allclose(found, exact, atol=3e-5, rtol=0)


@pytest.mark.parametrize("width", [7, 48, 192])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(norms: Kernels, width: int) -> None:
    x, scale, shift = random((70, width), (width,), (width,))
    alone = np.concatenate([norm(norms, "one", row[None], scale, shift) for row in x])
    for num_rows in range(1, 71):
        for rows, at in (("batch", slice(0, num_rows)), ("packed", slice(70 - num_rows, 70))):
            assert norm(norms, rows, x[at], scale, shift).tobytes() == alone[at].tobytes()
    known = norm(norms, "known", x[7:22], scale, shift)
    assert known.tobytes() == alone[7:22].tobytes()


def test_the_same_bits_on_any_number_of_threads(norms: Kernels) -> None:
    configure = tvm.get_global_func("runtime.config_threadpool")
    x, scale, shift = random((1000, 48), (48,), (48,))
    found = set()
    for num_threads in (1, 2, 2):
        configure(1, num_threads)
        found.add(norm(norms, "batch", x, scale, shift).tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("cpu", CPUS[1:])
def test_layer_norm_elsewhere(cpu: str) -> None:
    kernels = norms_for(cpu, [48])
    x, scale, shift = random((33, 48), (48,), (48,))
    found = norm(kernels, "batch", x, scale, shift)
    np.testing.assert_allclose(found, layer_norm(x, scale, shift, 1e-5), atol=3e-6)
    assert norm(kernels, "one", x[3:4], scale, shift).tobytes() == found[3:4].tobytes()


def placeholder(*shape: Any, dtype: str = "float32") -> te.Tensor:
    return te.placeholder(shape, dtype, "x")


SHAPES = [  # as declared, as given
    ((1, 768), (1, 768)),
    ((5, 48), (5, 48)),
    ((3, 7), (3, 7)),
    ((1, 5), (1, 5)),
    ((5,), (5,)),
    ((N, 33), (9, 33)),
    ((N, 64), (500, 64)),
    ((N, M), (6, 40)),
    ((N, M), (6, 3)),
    ((1, M), (1, 20)),
    ((N, 1, 7), (4, 1, 7)),
    ((1, N, 7), (1, 4, 7)),
    ((2, N, M), (2, 3, 17)),
    ((3, 4, 5, 16), (3, 4, 5, 16)),
]
REDUCTIONS: dict[str, tuple[Callable[[te.Tensor], te.Tensor], Callable[[Array], Array]]] = {
    "sum": (lambda x: topi.sum(x, axis=-1), lambda x: x.astype(np.float64).sum(-1)),
    "sum_kept": (
        lambda x: topi.sum(x, axis=-1, keepdims=True),
        lambda x: x.astype(np.float64).sum(-1, keepdims=True),
    ),
    "max": (lambda x: topi.max(x, axis=-1), lambda x: x.max(-1)),
    "min": (lambda x: topi.min(x, axis=-1), lambda x: x.min(-1)),
    "prod": (lambda x: topi.prod(x, axis=-1), lambda x: x.astype(np.float64).prod(-1)),
    "softmax": (lambda x: topi.nn.softmax(x, axis=-1), softmax),
    "log_softmax": (
        lambda x: topi.nn.log_softmax(x),
        lambda x: np.log(softmax(x)),
    ),
    "centred": (
        lambda x: topi.tanh(x - topi.max(x, axis=-1, keepdims=True)),
        lambda x: np.tanh(x.astype(np.float64) - x.max(-1, keepdims=True)),
    ),
}


@pytest.mark.parametrize(
    ("name", "declared", "given"),
    [
        (name, *shapes)
        for name in REDUCTIONS
        for shapes in SHAPES
        if name != "log_softmax" or len(shapes[0]) == 2  # TOPI has it of matrices only
    ],
    ids=str,
)
def test_reductions(name: str, declared: tuple[Any, ...], given: tuple[int, ...]) -> None:
    in_te, in_numpy = REDUCTIONS[name]
    x = placeholder(*declared)
    [values] = random(given)
    values = 1 + 0.3 * values if name == "prod" else 5 * values
    exact = np.asarray(in_numpy(values))
    loops = Loops(Reduction(), x, in_te(x))
    found = loops.run(values, out=(exact.shape, "float32"))
    np.testing.assert_allclose(found, exact, atol=2e-6 * max(1, np.abs(exact).max()), rtol=2e-5)


@pytest.mark.parametrize("cpu", CPUS[1:])
@pytest.mark.parametrize("name", ["sum", "max", "softmax"])
def test_reductions_elsewhere(name: str, cpu: str) -> None:
    in_te, in_numpy = REDUCTIONS[name]
    x = placeholder(N, M)
    [values] = random((6, 45))
    exact = in_numpy(values)
    found = Loops(Reduction(), x, in_te(x), cpu=cpu).run(values, out=(exact.shape, "float32"))
    np.testing.assert_allclose(found, exact, atol=5e-6)


@pytest.mark.parametrize("length", [*range(1, 41), 255, 256, 257])
@pytest.mark.parametrize("rows", [1, 7])
def test_every_length(softmaxes: Kernels, length: int, rows: int) -> None:
    """Of an unknown one, a tail of every size behind the vectors."""
    [x] = random((rows, length))
    np.testing.assert_allclose(softmaxes("f", 4 * x), softmax(4 * x), rtol=3e-6)


@pytest.fixture(scope="module")
def softmaxes() -> Kernels:
    kernels = Kernels({"f": (lambda x0: op.softmax(x0), [("n", "m")])}, [RULE])
    assert kernels.rules == {"f": [RULE]}
    return kernels


def test_masked_scores_and_not_a_number(softmaxes: Kernels) -> None:
    [x] = random((5, 37))
    x[1, 3:] = -np.inf
    x[2, 5] = np.nan
    x[3] *= 1e30
    found = softmaxes("f", x)
    np.testing.assert_allclose(found[[0, 1, 3, 4]], softmax(x[[0, 1, 3, 4]]), atol=1e-6)
    assert not found[1, 3:].any()
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize("dtype", ["int32", "int64", "float64", "float16"])
def test_other_types(dtype: str) -> None:
    x = placeholder(N, 33, dtype=dtype)
    values = (random((9, 33))[0] * 8).astype(dtype)
    for name in ("sum", "max", "min"):
        in_te, in_numpy = REDUCTIONS[name]
        found = Loops(Reduction(), x, in_te(x)).run(values, out=((9,), dtype))
        np.testing.assert_allclose(found, in_numpy(values), atol=0.2 if dtype == "float16" else 0)


def test_over_the_first_axis() -> None:
    """TOPI writes it as rows of the result, each a reduction over the last axis of its own."""
    [values] = random((33, 45))
    x = placeholder(33, 45)
    found = Loops(Reduction(), x, topi.sum(x, axis=0)).run(values, out=((45,), "float32"))
    np.testing.assert_allclose(found, values.astype(np.float64).sum(0), atol=1e-5)


# -- what it declines

X, SQUARE, BOOLS = placeholder(N, 64), placeholder(64, 64), placeholder(N, 64, dtype="bool")
SUM, SUM_OF_SQUARE = topi.sum(X, axis=1), topi.sum(SQUARE, axis=1)
KEPT = topi.sum(X, axis=1, keepdims=True)
OTHER_ROWS = "its loop nests do not run over the same rows"
NOT_OWN = "a row uses another row's reduction"
DECLINED: dict[str, tuple[list[te.Tensor], str]] = {
    "add": ([X, topi.add(X, X)], "it has no reduction"),
    "two_axes": ([SQUARE, topi.sum(SQUARE)], "a reduction is not over the last axis alone"),
    "mean": ([X, topi.divide(SUM, tirx.const(64, "float32"))], OTHER_ROWS),
    "argmax": ([X, topi.argmax(X, axis=1)], "is more than one store"),
    "all": (
        [BOOLS, topi.all(BOOLS, axis=1)],
        "a reduction is no sum, product, maximum or minimum",
    ),
    "scan": ([X, topi.cumsum(X, axis=1)], "it is not a sequence of loop nests, one block in each"),
    "two_outputs": ([X, SUM, topi.max(X, axis=1)], "it has more than one output"),
    "its_result_is_an_output_too": ([X, KEPT, X - KEPT], "it has more than one output"),
    "other_rows": (
        [SQUARE, te.compute((64, 64), lambda i, j: SQUARE[i, j] - SUM_OF_SQUARE[63 - i], "y")],
        NOT_OWN,
    ),
    "columns": ([SQUARE, SQUARE - SUM_OF_SQUARE], NOT_OWN),  # numpy's broadcasting: sum[j]
    "the_first_row": (
        [X, te.compute((N, 64), lambda i, j: X[i, j] - SUM[0], "y")],
        NOT_OWN,
    ),
    "another_length": (
        [X, te.compute((N, 3), lambda i, j: SUM[i] * j, "y")],
        OTHER_ROWS,
    ),
    "softmax_over_the_first_axis": (
        [X, topi.nn.softmax(X, axis=0)],
        OTHER_ROWS,
    ),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_it_declines(name: str) -> None:
    tensors, reason = DECLINED[name]
    found = Loops(Reduction(), *tensors).declined
    assert found is not None
    assert reason in found


def written(body: str) -> tirx.PrimFunc:
    """The sums of rows of 12, as this body of the block says."""
    lines = "\n            ".join(body.splitlines())
    return tvm.script.from_source(
        f"""
@T.prim_func(s_tir=True)
def main(x: T.Buffer((5, 12), "float32"), y: T.Buffer((5,), "float32")):
    for i, j in T.grid(5, 12):
        with T.sblock("sum"):
            v = T.axis.spatial(5, i)
            k = T.axis.reduce(12, j)
            {lines}
""",
        {"T": T},
    )


INIT = "with T.init():\n    y[v] = T.float32(0)\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (INIT + "y[v] = y[v] + x[v, k]", None),
        ("y[v] = y[v] + x[v, k]", "a reduction does not begin at its neutral element"),
        (
            INIT.replace("(0)", "(1)") + "y[v] = y[v] + x[v, k]",
            "a reduction does not begin at its neutral element",
        ),
        (
            INIT + "y[v] = y[v] * T.float32(2) + x[v, k]",  # Horner's: the order is part of it
            "a reduction is no sum, product, maximum or minimum",
        ),
        (
            INIT + "y[v] = y[4 - v] + x[v, k]",
            "a reduction is no sum, product, maximum or minimum",
        ),
        (
            INIT + "y[v] = y[v] - x[v, k]",
            "a reduction is no sum, product, maximum or minimum",
        ),
        (
            "T.where(j < 10)\n" + INIT + "y[v] = y[v] + x[v, k]",
            "a loop nest leaves out elements, by a predicate",
        ),
    ],
    ids=range(7),
)
def test_what_only_looks_like_a_sum(body: str, reason: str | None) -> None:
    assert Reduction().why_not(written(body), target_for("here")) == reason


def test_a_reduction_over_an_axis_that_is_not_the_last() -> None:
    func = tvm.script.from_source(
        """
@T.prim_func(s_tir=True)
def main(x: T.Buffer((12, 5), "float32"), y: T.Buffer((5,), "float32")):
    for j, i in T.grid(12, 5):
        with T.sblock("sum"):
            k = T.axis.reduce(12, j)
            v = T.axis.spatial(5, i)
            with T.init():
                y[v] = T.float32(0)
            y[v] = y[v] + x[k, v]
""",
        {"T": T},
    )
    reason = "a reduction is not over the last axis alone"
    assert Reduction().why_not(func, target_for("here")) == reason
