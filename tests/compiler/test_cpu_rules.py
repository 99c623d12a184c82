"""cpu.matmul and cpu.gemv: what numpy computes, the same bits in any batch.

What they cannot do they leave alone, and say why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi
from tvm.relax.frontend.nn import op

from profiles import known_rules
from profiles.cpu import gemv
from profiles.cpu.matmul import Matmul
from profiles.cpu.target import lanes
from serve.compiler.coverage import schedule
from serve.model import layers
from tests.compiler.conftest import CPUS, fused_toy, target_for
from tests.compiler.kernels import (
    Array,
    Function,
    Inputs,
    Kernels,
    Loops,
    Shape,
    packed,
    panel,
    random,
    uses,
)

pytestmark = pytest.mark.compiler

GEMV, MATMUL = "cpu.gemv", "cpu.matmul"
PANELS, ROWS, COLUMNS = LAYOUTS = (
    "panels",  # as the model's weights are packed
    "rows",  # [columns, length]
    "columns",  # [length, columns]
)


def product(layout: str, columns: int) -> Function:
    """(…, length) times a matrix in this layout."""
    if layout == COLUMNS:
        return lambda x0, x1: op.matmul(x0, x1)
    return lambda x0, x1: layers.matmul(x0, x1, columns)


def with_bias(layout: str, columns: int) -> Function:
    times = product(layout, columns)
    return lambda x0, x1, x2: times(x0, x1) + x2


def with_residual(layout: str, columns: int) -> Function:
    biased = with_bias(layout, columns)
    return lambda x0, x1, x2, x3: biased(x0, x1, x2) + x3


def laid_out(layout: str, weight: Array, cpu: str = "here") -> Array:
    """A weight of shape (columns, length)."""
    if layout == PANELS:
        return packed(weight, panel(cpu))
    return weight.T if layout == COLUMNS else weight


def shape_of(layout: str, columns: int, length: int, cpu: str = "here") -> Shape:
    if layout == PANELS:
        width = panel(cpu)
        return (-(-columns // width), length, width)
    return (length, columns) if layout == COLUMNS else (columns, length)


def assert_product(found: Array, x: Array, weight: Array, *added: Array) -> None:
    assert_near(found, x @ weight.T.astype(np.float64), np.abs(x) @ np.abs(weight.T), x, *added)


def assert_near(found: Array, exact: Array, size: Array, x: Array, *added: Array) -> None:
    """Within what float32 sums of this length may be off by, whatever their order.

    exact, size: of the product, and of that of the absolute values.
    """
    for array in added:
        exact, size = exact + array, size + np.abs(array)
    bound = (x.shape[-1] + 2) * np.finfo(np.float32).eps / 2 * size
    assert found.shape == exact.shape
    assert np.all(np.abs(found - exact) <= bound)
    # Errors of either sign: they are far better than that.
    assert np.abs(found - exact).max() <= np.abs(exact).max() * 1e-5


SHAPES = {  # columns, length
    PANELS: [
        *((1000, length) for length in (48, 192, 1280, 1600)),
        (50257, 64),
        (50257, 768),
        (3 * 768, 768),
        (768, 3072),
        (501, 80),
        (13, 64),
        (17, 1024),
        (2, 16),
        (64, 7),
        (65, 1),
    ],
    ROWS: [(1000, 48), (50257, 64), (13, 64), (17, 1024), (2, 16)],
    COLUMNS: [(1000, 48), (768, 3072), (64, 7), (52, 1), (4, 16)],
}
FEW = [(1000, 48), (501, 80), (13, 64)]  # on other processors


class Case(NamedTuple):
    layout: str
    cpu: str
    columns: int
    length: int

    def __str__(self) -> str:
        return f"{self.layout}-{self.cpu}-{self.columns}-{self.length}"


CASES = [
    *(Case(layout, "here", *shape) for layout, shapes in SHAPES.items() for shape in shapes),
    *(Case(PANELS, cpu, *shape) for cpu in CPUS[1:] for shape in FEW),
    *(Case(ROWS, cpu, 1000, 48) for cpu in CPUS[1:]),
]
FORMS: dict[str, Shape] = {"one": (1, 1), "batch": ("n", 1), "packed": (1, "n")}


@cache
def compiled(layout: str, cpu: str) -> Kernels:
    functions: dict[str, tuple[Function, Inputs]] = {}
    for case in CASES:
        if (case.layout, case.cpu) != (layout, cpu):
            continue
        columns, length = case.columns, case.length
        for form, x in FORMS.items():
            functions[f"{form}_{columns}_{length}"] = (
                with_residual(layout, columns),
                [
                    (*x, length),
                    shape_of(layout, columns, length, cpu),
                    (columns,),
                    (*x, columns),
                ],
            )
    return Kernels(functions, cpu=cpu)


class Residuals:
    """The products of one case, with bias and residual; x and residual are (rows, …)."""

    def __init__(self, case: Case, num_rows: int, seed: int = 0) -> None:
        self.case, columns, length = case, case.columns, case.length
        shapes = ((columns, length), (columns,), (num_rows, length), (num_rows, columns))
        self.weight, self.bias, self.x, self.residual = random(*shapes, seed=seed)

    def __call__(self, form: str, at: slice) -> Array:
        x, residual = self.x[at], self.residual[at]
        axis = 0 if form == "packed" else 1
        name = f"{form}_{self.case.columns}_{self.case.length}"
        weight = laid_out(self.case.layout, self.weight, self.case.cpu)
        inputs = np.expand_dims(x, axis), weight, self.bias, np.expand_dims(residual, axis)
        return compiled(self.case.layout, self.case.cpu)(name, *inputs).squeeze(axis)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape(case: Case) -> None:
    of = Residuals(case, 9)
    exact = of.x @ of.weight.T.astype(np.float64)
    size = np.abs(of.x) @ np.abs(of.weight.T)
    for form, at in (("one", slice(0, 1)), ("batch", slice(1, 4)), ("packed", slice(4, 9))):
        name = f"{form}_{case.columns}_{case.length}"
        rules = compiled(case.layout, case.cpu).rules[name]
        # Of a length of 1 there is no sum: it is no product to them.
        taker = None if case.length == 1 else GEMV if form == "one" else MATMUL
        assert rules == [taker]
        assert_near(of(form, at), exact[at], size[at], of.x[at], of.bias, of.residual[at])


# Around the edges of tiles (6 rows, then 4, 2 and 1) and of a thread's task.
TASK_ROWS = Matmul().task_rows
NUM_ROWS = [*range(1, 71), *(n * TASK_ROWS + more for n in (1, 2) for more in (-1, 0, 1, 7))]
SMALL = [case for case in CASES if (case.columns, case.length) in ((1000, 48), (501, 80), (13, 64))]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(case: Case) -> None:
    """However many rows there are and wherever it is among them."""
    of = Residuals(case, NUM_ROWS[-1])
    alone = np.concatenate([of("one", slice(row, row + 1)) for row in range(NUM_ROWS[-1])])
    chance = np.random.default_rng(0)
    for num_rows in NUM_ROWS:
        first = int(chance.integers(0, NUM_ROWS[-1] - num_rows + 1))
        for form, begin in (("batch", 0), ("packed", first)):
            at = slice(begin, begin + num_rows)
            assert of(form, at).tobytes() == alone[at].tobytes()


@pytest.mark.parametrize(
    "case",
    [Case(PANELS, "here", 50257, 64), Case(ROWS, "here", 17, 1024), Case(COLUMNS, "here", 64, 7)],
    ids=str,
)
def test_the_same_bits_every_time_and_on_any_number_of_threads(case: Case) -> None:
    configure = tvm.get_global_func("runtime.config_threadpool")
    of = Residuals(case, 101)
    for form, at in (("one", slice(0, 1)), ("batch", slice(0, 101))):
        found = set()
        for num_threads in (1, 2, 2, 2):
            configure(1, num_threads)
            found.add(of(form, at).tobytes())
        assert len(found) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_a_number_stays_in_its_place(layout: str) -> None:
    of = Residuals(Case(layout, "here", 1000, 48), 8)
    of.weight[7, 3], of.weight[9, 5] = np.nan, np.inf
    of.bias[11] = -np.inf
    of.x[2, 0], of.x[4, 1] = np.nan, np.inf
    of.residual[6, 13] = np.nan
    for found in (of("batch", slice(0, 8)), of("packed", slice(0, 8))):
        for row in (0, 1, 3, 5, 7):
            assert [*np.flatnonzero(~np.isfinite(found[row]))] == [7, 9, 11]
        assert np.isnan(found[2]).all()
        assert not np.isfinite(found[4]).any()
        assert [*np.flatnonzero(~np.isfinite(found[6]))] == [7, 9, 11, 13]


def gelu_tanh(x: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    result: Array = 0.5 * x * (1 + np.tanh(inner))
    return result


def erf(x: Array) -> Array:
    result: Array = np.vectorize(math.erf)(x)
    return result


BIASED, RESIDUAL = with_bias(PANELS, 501), with_residual(PANELS, 501)
EPILOGUES: dict[str, tuple[Function, int, Callable[..., Array]]] = {
    # name: in Relax, the number of added tensors, in numpy (of the exact product)
    "bias": (BIASED, 1, lambda y, b: y + b),
    "gelu_tanh": (
        lambda x0, x1, x2: op.gelu(BIASED(x0, x1, x2), approximate="tanh"),
        1,
        lambda y, b: gelu_tanh(y + b),
    ),
    "gelu": (
        lambda x0, x1, x2: op.gelu(BIASED(x0, x1, x2)),
        1,
        lambda y, b: 0.5 * (y + b) * (1 + erf((y + b) / math.sqrt(2))),
    ),
    "relu": (lambda x0, x1, x2: op.relu(BIASED(x0, x1, x2)), 1, lambda y, b: np.maximum(y + b, 0)),
    "silu": (
        lambda x0, x1, x2: op.silu(BIASED(x0, x1, x2)),
        1,
        lambda y, b: (y + b) / (1 + np.exp(-(y + b))),
    ),
    "tanh": (lambda x0, x1, x2: op.tanh(BIASED(x0, x1, x2)), 1, lambda y, b: np.tanh(y + b)),
    "residual": (RESIDUAL, 2, lambda y, b, r: y + b + r),
    "gelu_and_residual": (
        lambda x0, x1, x2, x3: op.gelu(BIASED(x0, x1, x2), approximate="tanh") + x3,
        2,
        lambda y, b, r: gelu_tanh(y + b) + r,
    ),
}


@pytest.fixture(scope="module")
def epilogues() -> Kernels:
    functions: dict[str, tuple[Function, Inputs]] = {}
    for batch in (1, "n"):
        inputs = [(batch, 1, 64), shape_of(PANELS, 501, 64), (501,), (batch, 1, 501)]
        for name, (function, num_added, _) in EPILOGUES.items():
            functions[f"{name}_{batch}"] = (function, inputs[: 2 + num_added])
    return Kernels(functions)


@pytest.mark.parametrize("name", EPILOGUES)
def test_every_epilogue(epilogues: Kernels, name: str) -> None:
    _, num_added, in_numpy = EPILOGUES[name]
    x, weight, *added = random((7, 1, 64), (501, 64), (501,), (7, 1, 501))
    added, x = added[:num_added], 3 * x
    assert epilogues.rules[f"{name}_1"] == [GEMV]
    assert epilogues.rules[f"{name}_n"] == [MATMUL]
    in_panels = laid_out(PANELS, weight)
    found = epilogues(f"{name}_n", x, in_panels, *added)
    expected = in_numpy(x.astype(np.float64) @ weight.astype(np.float64).T, *added)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
    row_of_each = [array[:1] if array.ndim == 3 else array for array in added]
    one = epilogues(f"{name}_1", x[:1], in_panels, *row_of_each)
    assert one.tobytes() == found[:1].tobytes()


N = te.var("n", "int64")


def matrix(*shape: Any, dtype: str = "float32", name: str = "x") -> te.Tensor:
    return te.placeholder(shape, dtype, name)


def test_every_legal_parameter() -> None:
    """Each height and width of the tile computes each row in the same bits."""
    num_columns, length, num_rows = 101, 48, 205
    target = target_for("here")
    legal: dict[str, Any] = {p.name: p.legal for p in known_rules()[MATMUL].parameters}
    assert [p.legal for p in known_rules()[GEMV].parameters] == [legal["vectors"]]
    vectors = [n for n in legal["vectors"] if n]  # 0 is one of the others
    assert Matmul().panel(target) in [Matmul(vectors=n).panel(target) for n in vectors]
    tiles = itertools.product(legal["rows"], vectors)
    rules: list[Any] = [
        *itertools.starmap(gemv.GEMV, zip(vectors, strict=True)),
        *(Matmul(*tile, n) for tile, n in zip(tiles, itertools.cycle(legal["task_rows"]))),
    ]
    functions = {}
    for number, rule in enumerate(rules):
        width, rows = rule.panel(target), 1 if isinstance(rule, gemv.GEMV) else N
        assert width == lanes(target) * rule.vectors
        x, w = matrix(rows, length), matrix(-(-num_columns // width), length, width, name="w")
        loops = Loops(rule, x, w, layers._matmul(x, w, num_columns))
        assert loops.declined is None
        name = f"f{number}"
        functions[name] = loops.scheduled().mod["main"].with_attr("global_symbol", name)
    library = tvm.compile(tvm.IRModule(functions), target=target)
    inputs, weight = random((num_rows, length), (num_columns, length))
    results = set()
    for rule, name in zip(rules, functions, strict=True):
        step = 1 if isinstance(rule, gemv.GEMV) else num_rows
        in_panels, found = tvm.runtime.tensor(packed(weight, rule.panel(target))), []
        for first in range(0, num_rows, step):
            out = tvm.runtime.tensor(np.full((step, num_columns), 77, np.float32))
            library[name](tvm.runtime.tensor(inputs[first : first + step]), in_panels, out)
            found.append(out.numpy())
        results.add(np.concatenate(found).tobytes())
    assert len(results) == 1
    result = np.frombuffer(results.pop(), np.float32).reshape(num_rows, num_columns)
    assert_product(result, inputs, weight)


def test_panels_suit_the_target() -> None:
    """Four vectors of AVX-512's 32 registers, two of the 16 that others have."""
    widths = {cpu: panel(cpu) for cpu in ("haswell", "x86-64")}
    assert widths == {"haswell": 16, "x86-64": 8}
    assert [Matmul(vectors=n).panel(target_for("haswell")) for n in (1, 3, 6)] == [8, 24, 48]
    for rule in (Matmul(), gemv.GEMV()):
        assert rule.panel(tvm.target.Target({"kind": "llvm", "mcpu": "skylake-avx512"})) == 64
        arm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
        assert rule.panel(tvm.target.Target(arm)) == 16


def pack_function(width: int) -> Function:
    return lambda x0: layers.pack(x0, width)


def test_the_model_packs_as_numpy_does() -> None:
    widths = (8, 16, 64, 96)
    kernels = Kernels(
        {f"pack_{width}": (pack_function(width), [("rows", "columns")]) for width in widths},
        ["cpu.elementwise"],
    )
    for width in widths:
        for shape in ((1, 1), (7, 5), (63, 48), (64, 3), (65, 17), (501, 80), (192, 1)):
            [weight] = random(shape)
            found = kernels(f"pack_{width}", weight)
            np.testing.assert_array_equal(found, packed(weight, width))
        assert not found.reshape(-1)[np.prod(shape) :].any() or width == 96


# -- what they decline


def sum_of(length: int, element: Callable[[Any], Any]) -> Any:
    k = te.reduce_axis((0, length), "k")
    return te.sum(element(k), k)


X, ONE = matrix(N, 64), matrix(1, 64)
W, W_ROWS = matrix(64, 32, name="w"), matrix(32, 64, name="w")
W_PANELS = matrix(2, 64, 16, name="w")
Y = topi.matmul(X, W)
NO_REDUCTION = "it does not begin with one reduction over the last axis"
NO_LAYOUT = "the matrix is neither [length, columns] nor packed in panels"
MANY, SINGLE = (
    "it has several rows: that is cpu.matmul's",
    "it has a single row: that is cpu.gemv's",
)
UNKNOWN = "the matrix has a size that is not known when compiling"

DECLINED: dict[str, tuple[list[te.Tensor], str]] = {
    "add": ([X, matrix(N, 64), topi.add(X, X)], NO_REDUCTION),
    "softmax": ([X, topi.nn.softmax(X)], "it is not a sum in float32"),
    "transpose": ([X, topi.transpose(X)], NO_REDUCTION),
    "sum": ([W, topi.sum(W, axis=1)], "it is not a sum of products"),
    "max": ([W, topi.max(W, axis=1)], "it is not a sum in float32"),
    "two_axes": ([W, topi.sum(W)], NO_REDUCTION),
    "scan": ([X, topi.cumsum(X, axis=1)], "it is not a sequence of loop nests, one block in each"),
    "argmax": ([X, topi.argmax(X, axis=1)], "more than one store"),
    "unknown_columns": (
        (lambda w: [X, w, topi.matmul(X, w)])(matrix(64, te.var("m", "int64"), name="w")),
        UNKNOWN,
    ),
    "unknown_length": (
        (lambda x, w: [x, w, topi.matmul(x, w)])(
            matrix(4, te.var("m", "int64")), matrix(te.var("m", "int64"), 32, name="w")
        ),
        UNKNOWN,
    ),
    "odd_columns": (
        (lambda w: [X, w, topi.matmul(X, w)])(matrix(64, 13, name="w")),
        "its 13 columns are no vectors of 4",
    ),
    "odd_length_of_rows": (
        (lambda x, w: [x, w, topi.matmul(x, w, False, True)])(
            matrix(N, 9), matrix(10, 9, name="w")
        ),
        "the matrix is [columns, length]: its rows would have to be packed first",
    ),
    "float16": (
        (lambda x, w: [x, w, topi.matmul(x, w)])(
            matrix(N, 64, dtype="float16"), matrix(64, 32, dtype="float16", name="w")
        ),
        "it is not a sum in float32",
    ),
    "float16_summed_in_float32": (
        (lambda x: [x, W, te.compute(
            (N, 32), lambda i, j: sum_of(64, lambda k: x[i, k].astype("float32") * W[k, j]), "y"
        )])(matrix(N, 64, dtype="float16")),
        "a factor is not an element of a float32 tensor",
    ),
    "three_factors": (
        [X, W, te.compute(
            (N, 32), lambda i, j: sum_of(64, lambda k: X[i, k] * (W[k, j] * W[k, j])), "y"
        )],
        "a factor is not an element of a float32 tensor",
    ),
    "left_is_transposed": (
        (lambda x: [x, W, topi.matmul(x, W, True, False)])(matrix(64, N)),
        "no factor is rows of contiguous elements along the reduction",
    ),
    "a_matrix_for_each_row": (
        (lambda x, w: [x, w, topi.nn.batch_matmul(x, w)])(
            matrix(3, 5, 64), matrix(3, 32, 64, name="w")
        ),
        NO_LAYOUT,
    ),
    "packed_another_way": (
        [X, W_PANELS, te.compute(
            (N, 32), lambda i, j: sum_of(64, lambda k: X[i, k] * W_PANELS[j % 2, k, j // 2]), "y"
        )],
        NO_LAYOUT,
    ),
    "out_is_transposed": (
        [X, W, te.compute(
            (32, N), lambda j, i: sum_of(64, lambda k: X[i, k] * W[k, j]), "y"
        )],
        "no factor is rows of contiguous elements along the reduction",
    ),
    "softmax_follows": (
        [X, W, topi.nn.softmax(Y)],
        "loop nests follow the product, and one epilogue is fused",
    ),
    "a_sum_follows": ([X, W, topi.sum(Y, axis=1)], "what follows the product is not elementwise"),
    "a_transposition_follows": (
        [X, W, topi.transpose(Y)],
        "what follows the product does not use it element by element",
    ),
    "another_shape_follows": (
        [X, W, topi.reshape(Y, (N, 4, 8))],
        "what follows the product has another shape",
    ),
    "its_neighbour_follows": (
        [X, W, te.compute((N, 32), lambda i, j: Y[i, j] - Y[i, 31 - j], "z")],
        "what follows the product does not use it element by element",
    ),
    "two_outputs": ([X, W, Y, topi.tanh(Y)], "it has more than one output"),
    "two_outputs_of_rows": (
        (lambda y: [X, W_ROWS, y, topi.tanh(y)])(topi.matmul(X, W_ROWS, False, True)),
        "it has more than one output",
    ),
    "one_row": ([ONE, W, topi.matmul(ONE, W)], SINGLE),
    "one_row_of_rows": ([ONE, W_ROWS, topi.matmul(ONE, W_ROWS, False, True)], SINGLE),
    "one_row_of_panels": ([ONE, W_PANELS, layers._matmul(ONE, W_PANELS, 32)], SINGLE),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_matmul_declines(name: str) -> None:
    tensors, reason = DECLINED[name]
    found = Loops(Matmul(), *tensors).declined
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("name", [name for name in DECLINED if not name.startswith("one_row")])
def test_what_gemv_declines(name: str) -> None:
    tensors, reason = DECLINED[name]
    found = Loops(gemv.GEMV(), *tensors).declined
    assert found is not None
    if name in ("odd_columns", "odd_length_of_rows"):  # they have many rows too
        reason = MANY
    assert reason in found


@pytest.mark.parametrize(
    ("weight", "times"),
    [
        (W, topi.matmul),
        (W_ROWS, lambda x, w: topi.matmul(x, w, False, True)),
        (W_PANELS, lambda x, w: layers._matmul(x, w, 32)),
    ],
    ids=[COLUMNS, ROWS, PANELS],
)
def test_each_has_its_own(weight: te.Tensor, times: Callable[..., te.Tensor]) -> None:
    for x, taker, other, reason in (
        (X, Matmul(), gemv.GEMV(), MANY),
        (matrix(3, 64), Matmul(), gemv.GEMV(), MANY),
        (ONE, gemv.GEMV(), Matmul(), SINGLE),
    ):
        assert Loops(taker, x, weight, times(x, weight)).declined is None
        assert Loops(other, x, weight, times(x, weight)).declined == reason


def test_only_for_llvm() -> None:
    """On a GPU they take nothing, whatever a profile says."""
    mod, target = fused_toy("cuda")
    ids = [rule.id for rule in known_rules().values() if rule.path.startswith("profiles.cpu.")]
    assert len(ids) == 5
    coverage = schedule(mod, uses(ids), target)[1]
    assert {entry.rule for entry in coverage} == {None}
    reasons = {reason for entry in coverage for reason in entry.declined.values()}
    assert reasons == {"it schedules for llvm, not for cuda"}


def begun_at(start: float) -> tirx.PrimFunc:
    """A product of TE whose sum begins at this number."""
    out = matrix(4, 64)
    func = te.create_prim_func([out, W, topi.matmul(out, W)])
    text = func.script().replace("= T.float32(0.0)", f"= T.float32({start})")
    return tvm.script.from_source(text)


@pytest.mark.parametrize("rule", [Matmul(), gemv.GEMV()])
def test_a_sum_that_begins_elsewhere(rule: Any) -> None:
    target = target_for("here")
    assert rule.why_not(begun_at(1.0), target) == "the sum does not begin at 0"
    assert rule.why_not(begun_at(0.0), target) in (None, MANY)


def sized(shape: Shape) -> tuple[int, ...]:
    sizes = {"n": 3, "m": 2}
    known: list[Any] = [sizes.get(n, n) for n in shape]
    return tuple(known)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        ((2, 1, 64), (100, 64)),
        ((1, 5, 64), (100, 64)),
        ((2, 3, 64), (100, 64)),
        ((1, 1, 64), (1, 64)),
        ((6, 64), (100, 64)),
        ((1, 64), (100, 64)),
        (("n", "m", 64), (100, 64)),
        ((3, 1, 64), (3, 100, 64)),  # a matrix for each vector
        (("n", 5, 64), ("n", 100, 64)),
        ((1, 1, 7), (10, 7)),
        (("n", 1, 1), (10, 1)),
        ((1, 1, 64), ("n", 64)),
        ((1, 1, "n"), (10, "n")),
    ],
)
def test_forms_that_are_taken_or_left_and_right(x: Shape, weight: Shape) -> None:
    def transposed(x0: Any, x1: Any) -> Any:
        axes = [0, 2, 1] if len(weight) == 3 else None
        return op.matmul(x0, op.permute_dims(x1, axes))

    inputs = random(*(sized(shape) for shape in (x, weight)))
    kernels = Kernels({"f": (transposed, [x, weight])})
    exact = inputs[0].astype(np.float64) @ inputs[1].swapaxes(-1, -2)
    np.testing.assert_allclose(kernels("f", *inputs), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("x", [(2, 3, 64), ("n", "m", 64), (6, 64), (1, 64), (1, 1, 1, 64)])
def test_any_number_of_axes_of_packed_weights(x: Shape) -> None:
    kernels = Kernels(
        {"f": (product(PANELS, 101), [x, shape_of(PANELS, 101, 64)])},
    )
    rows, weight = random(sized(x), (101, 64))
    assert kernels.rules["f"] == [MATMUL if rows.size > 64 else GEMV]
    assert_product(kernels("f", rows, laid_out(PANELS, weight)), rows, weight)


def test_two_products_and_what_comes_before_and_after() -> None:
    """What is not fused into a product's kernel stays outside, and right."""
    first, second = product(PANELS, 128), product(PANELS, 32)
    shapes = [(1, 1, 64), shape_of(PANELS, 128, 64), shape_of(PANELS, 32, 128)]
    kernels = Kernels(
        {"f": (lambda x0, x1, x2: op.softmax(second(first(op.silu(x0), x1), x2)), shapes)}
    )
    assert sorted(str(rule) for rule in kernels.rules["f"]) == ["None", "None", GEMV, GEMV]
    x, one, other = random((1, 1, 64), (128, 64), (32, 128))
    inner = (x / (1 + np.exp(-x.astype(np.float64)))) @ one.T.astype(np.float64)
    powers = np.exp(inner @ other.T.astype(np.float64))
    found = kernels("f", x, laid_out(PANELS, one), laid_out(PANELS, other))
    np.testing.assert_allclose(found, powers / powers.sum(), rtol=1e-4)


@pytest.mark.parametrize("batch", [1, "n"])
def test_float16_is_no_worse_than_without_them(batch: int | str) -> None:
    x, weight = random((1, 1, 768), (100, 768), dtype="float16")
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    errors = []
    for rule_ids in ((MATMUL, GEMV), ()):
        shapes: Inputs = [(batch, 1, 768), (100, 768)]
        found = Kernels({"f": (product(ROWS, 100), shapes)}, rule_ids, "float16")("f", x, weight)
        assert found.dtype == np.float16
        errors.append(np.abs(found - exact).max())
    assert errors[0] <= errors[1]


def test_sums_of_squares_are_right() -> None:
    """Each of one row with itself: no matrix, and cpu.gemv takes it."""
    [x] = random((37, 32))
    w = matrix(37, 32)
    squares = te.compute((37,), lambda i: sum_of(32, lambda k: w[i, k] * w[i, k]), "y")
    found = Loops(gemv.GEMV(), w, squares).run(x, out=((37,), "float32"))
    np.testing.assert_allclose(found, (x.astype(np.float64) ** 2).sum(1), rtol=1e-6)
