"""Our own CPU rules: their kernels compute what numpy does, the same bits in any batch.

What they cannot do they leave alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from profiles import RuleUse, known_rules
from serve.backends import get_backend
from serve.compiler.coverage import schedule
from serve.compiler.pipeline import fuse, lower
from tests.compiler.conftest import fused_toy

pytestmark = pytest.mark.compiler

GEMV, MATMUL = "cpu.gemv", "cpu.matmul"
PARAMETERS = known_rules()[GEMV].parameters
Array = NDArray[Any]
Function = Callable[..., Any]
Shapes = Sequence[tuple[Any, ...]]


@tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
def no_passes(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    return mod


class Kernels:
    """Functions compiled under these rules: name -> what it does, and its inputs' shapes."""

    def __init__(
        self,
        functions: Mapping[str, tuple[Function, Shapes]],
        rule_ids: Sequence[str] = (MATMUL, GEMV),
        dtype: str = "float32",
        **values: Any,
    ) -> None:
        spec: dict[str, Any] = {}
        module = nn.Module()
        for name, (function, shapes) in functions.items():
            setattr(module, name, function)
            inputs = {f"x{i}": nn.spec.Tensor(list(shape), dtype) for i, shape in enumerate(shapes)}
            spec[name] = inputs | {"$": {"param_mode": "none", "effect_mode": "none"}}
        values = {p.name: p.default for p in PARAMETERS} | values
        uses = [RuleUse(known_rules()[rule_id], values) for rule_id in rule_ids]
        target = tvm.target.Target(get_backend("cpu").target())
        with target:
            mod = fuse(module.export_tvm(spec=spec)[0])
            mod, coverage = schedule(mod, uses, target)
            executable = tvm.compile(lower(mod), target=target, relax_pipeline=no_passes)
        self.rules = {
            name: [entry.rule for entry in coverage if name in entry.called_by]
            for name in functions
        }
        self._vm = relax.VirtualMachine(executable, tvm.cpu())

    def __call__(self, name: str, *inputs: Array) -> Array:
        tensors = [tvm.runtime.tensor(array) for array in inputs]
        result: Array = self._vm[name](*tensors).numpy()
        return result


def product(x0: Any, x1: Any) -> Any:
    return op.matmul(x0, op.permute_dims(x1))


def columns(x0: Any, x1: Any) -> Any:
    return op.matmul(x0, x1)


def with_bias(x0: Any, x1: Any, x2: Any) -> Any:
    return product(x0, x1) + x2


def with_gelu(x0: Any, x1: Any, x2: Any) -> Any:
    return op.gelu(with_bias(x0, x1, x2), approximate="tanh")


def with_residual(x0: Any, x1: Any, x2: Any, x3: Any) -> Any:
    return with_bias(x0, x1, x2) + x3


def random(*shapes: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [(rng.random(shape, np.float32) * 2 - 1).astype(dtype) for shape in shapes]


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
    # The sums run in lanes, so that they are far better than that.
    assert np.abs(found - exact).max() <= np.abs(exact).max() * 1e-5


SHAPES = [
    *((1000, length) for length in (48, 64, 192, 768, 1280, 1600)),
    (50257, 64),
    (50257, 768),
    (3 * 768, 768),
    (768, 3072),
    (13, 64),
    (17, 1024),
    (2, 16),
]


@pytest.fixture(scope="module")
def shapes() -> Kernels:
    functions: dict[str, tuple[Function, Shapes]] = {}
    for rows, length in SHAPES:
        for form, x in (("one", (1, 1)), ("batch", ("n", 1)), ("packed", (1, "n"))):
            inputs: Shapes = [(*x, length), (rows, length), (rows,), (*x, rows)]
            functions[f"product_{form}_{rows}_{length}"] = (product, inputs[:2])
            functions[f"residual_{form}_{rows}_{length}"] = (with_residual, inputs)
    return Kernels(functions)


@pytest.mark.parametrize(("rows", "length"), SHAPES)
def test_every_shape(shapes: Kernels, rows: int, length: int) -> None:
    weight, bias, all_x, residual = random((rows, length), (rows,), (9, length), (9, rows))
    exact = all_x @ weight.T.astype(np.float64)
    size = np.abs(all_x) @ np.abs(weight.T)
    for form, shape, at in (
        ("one", (1, 1), slice(0, 1)),
        ("batch", (3, 1), slice(1, 4)),
        ("packed", (1, 5), slice(4, 9)),
    ):
        x, sums, sizes, more = (
            array[at].reshape(*shape, -1) for array in (all_x, exact, size, residual)
        )
        for name, added in (("product", []), ("residual", [bias, more])):
            name = f"{name}_{form}_{rows}_{length}"
            assert shapes.rules[name] == [GEMV if form == "one" else MATMUL]
            assert_near(shapes(name, x, weight, *added), sums, sizes, x, *added)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(shapes: Kernels, num_rows: int) -> None:
    for rows, length in ((1000, 64), (1000, 768), (13, 64), (17, 1024), (2, 16)):
        at = f"{rows}_{length}"
        x, weight, bias, residual = random(
            (num_rows, 1, length), (rows, length), (rows,), (num_rows, 1, rows)
        )
        batch = shapes(f"residual_batch_{at}", x, weight, bias, residual)
        packed = shapes(
            f"residual_packed_{at}",
            np.ascontiguousarray(x.swapaxes(0, 1)),
            weight,
            bias,
            np.ascontiguousarray(residual.swapaxes(0, 1)),
        )
        np.testing.assert_array_equal(batch[:, 0], packed[0])
        for row in range(num_rows):
            alone = shapes(
                f"residual_one_{at}", x[row : row + 1], weight, bias, residual[row : row + 1]
            )
            np.testing.assert_array_equal(batch[row], alone[0])


def test_the_same_bits_every_time_and_on_any_number_of_threads(shapes: Kernels) -> None:
    configure = tvm.get_global_func("runtime.config_threadpool")
    for rows, length in ((50257, 64), (1000, 1600), (17, 1024)):
        for form, x_shape in (("one", (1, 1)), ("batch", (4, 1))):
            x, weight = random((*x_shape, length), (rows, length), seed=1)
            found = set()
            for num_threads in (1, 2, 2, 2):
                configure(1, num_threads)
                found.add(shapes(f"product_{form}_{rows}_{length}", x, weight).tobytes())
            assert len(found) == 1


def test_not_a_number_stays_in_its_place(shapes: Kernels) -> None:
    x, weight = random((4, 1, 64), (1000, 64))
    weight[7, 3] = np.nan
    weight[9, 5] = np.inf
    x[2, 0, 0] = np.nan
    found = shapes("product_batch_1000_64", x, weight)[:, 0]
    for row in (0, 1, 3):
        assert [*np.flatnonzero(~np.isfinite(found[row]))] == [7, 9]
    assert np.isnan(found[2]).all()


def gelu_tanh(x: Array) -> Array:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    result: Array = 0.5 * x * (1 + np.tanh(inner))
    return result


def erf(x: Array) -> Array:
    result: Array = np.vectorize(math.erf)(x)
    return result


EPILOGUES: dict[str, tuple[Function, int, Callable[..., Array]]] = {
    # name: in Relax, the number of added tensors, in numpy (of the exact product)
    "bias": (with_bias, 1, lambda y, b: y + b),
    "gelu_tanh": (with_gelu, 1, lambda y, b: gelu_tanh(y + b)),
    "gelu": (
        lambda x0, x1, x2: op.gelu(with_bias(x0, x1, x2)),
        1,
        lambda y, b: 0.5 * (y + b) * (1 + erf((y + b) / math.sqrt(2))),
    ),
    "relu": (
        lambda x0, x1, x2: op.relu(with_bias(x0, x1, x2)),
        1,
        lambda y, b: np.maximum(y + b, 0),
    ),
    "silu": (
        lambda x0, x1, x2: op.silu(with_bias(x0, x1, x2)),
        1,
        lambda y, b: (y + b) / (1 + np.exp(-(y + b))),
    ),
    "tanh": (lambda x0, x1, x2: op.tanh(with_bias(x0, x1, x2)), 1, lambda y, b: np.tanh(y + b)),
    "residual": (with_residual, 2, lambda y, b, r: y + b + r),
    "gelu_and_residual": (
        lambda x0, x1, x2, x3: with_gelu(x0, x1, x2) + x3,
        2,
        lambda y, b, r: gelu_tanh(y + b) + r,
    ),
}


@pytest.fixture(scope="module")
def epilogues() -> Kernels:
    functions = {}
    for batch in (1, "n"):
        shapes = [(batch, 1, 64), (1000, 64), (1000,), (batch, 1, 1000)]
        for name, (function, num_added, _) in EPILOGUES.items():
            functions[f"{name}_{batch}"] = (function, shapes[: 2 + num_added])
    return Kernels(functions)


@pytest.mark.parametrize("name", EPILOGUES)
@pytest.mark.parametrize(("batch", "num_rows", "rule"), [(1, 1, GEMV), ("n", 3, MATMUL)])
def test_every_epilogue(
    epilogues: Kernels, name: str, batch: int | str, num_rows: int, rule: str
) -> None:
    _, num_added, in_numpy = EPILOGUES[name]
    x, weight, *added = random((num_rows, 1, 64), (1000, 64), (1000,), (num_rows, 1, 1000))
    added = added[:num_added]
    assert epilogues.rules[f"{name}_{batch}"] == [rule]
    expected = in_numpy(x.astype(np.float64) @ weight.astype(np.float64).T, *added)
    found = epilogues(f"{name}_{batch}", x, weight, *added)
    np.testing.assert_allclose(found, expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("values", list(itertools.product(*(p.legal for p in PARAMETERS))))
def test_every_legal_parameter(values: tuple[Any, ...]) -> None:
    num_rows, length = 37, 192
    shapes: Shapes = [(num_rows, length), (num_rows,)]
    kernels = Kernels(
        {
            "one": (with_bias, [(1, 1, length), *shapes]),
            "n": (with_bias, [("n", 1, length), *shapes]),
        },
        **{p.name: value for p, value in zip(PARAMETERS, values, strict=True)},
    )
    assert kernels.rules == {"one": [GEMV], "n": [MATMUL]}
    x, weight, bias = random((5, 1, length), *shapes)
    batch = kernels("n", x, weight, bias)
    assert_product(batch, x, weight, bias)
    np.testing.assert_array_equal(kernels("one", x[:1], weight, bias), batch[:1])


OTHERS: dict[str, tuple[Function, Shapes]] = {
    # The names say why not.
    "odd_length": (product, [(1, 1, 7), (10, 7)]),
    "odd_length_of_many": (product, [("n", 1, 9), (10, 9)]),
    "length_of_one": (product, [(1, 1, 1), (10, 1)]),
    "rows_of_unknown_number": (product, [(1, 1, 64), ("n", 64)]),
    "unknown_length": (product, [(1, 1, "n"), (10, "n")]),
    "columns": (columns, [(1, 1, 64), (64, 100)]),
    "columns_of_many": (columns, [("n", 1, 64), (64, 100)]),
}


@pytest.fixture(scope="module")
def others() -> Kernels:
    return Kernels(OTHERS)


@pytest.mark.parametrize("name", OTHERS)
def test_what_they_decline_works_without_them(others: Kernels, name: str) -> None:
    assert others.rules[name] == [None]
    shapes = [tuple(24 if n == "n" else n for n in shape) for shape in OTHERS[name][1]]
    x, weight = random(*shapes)
    is_columns = name.startswith("columns")
    assert_product(others(name, x, weight), x, weight.T if is_columns else weight)


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
    ],
)
def test_other_forms_are_taken_or_left_and_right(
    x: tuple[Any, ...], weight: tuple[Any, ...]
) -> None:
    def transposed(x0: Any, x1: Any) -> Any:
        axes = [0, 2, 1] if len(weight) == 3 else None
        return op.matmul(x0, op.permute_dims(x1, axes))

    sizes = {"n": 3, "m": 2}
    inputs = random(*(tuple(sizes.get(n, n) for n in shape) for shape in (x, weight)))
    kernels = Kernels({"f": (transposed, [x, weight])})
    exact = inputs[0].astype(np.float64) @ inputs[1].swapaxes(-1, -2)
    np.testing.assert_allclose(kernels("f", *inputs), exact, atol=1e-5, rtol=0)


def test_what_is_no_product_is_declined() -> None:
    def norm(x0: Any, x1: Any) -> Any:
        return op.layer_norm(x0, [64], x1, x1)

    kernels = Kernels(
        {
            "add": (lambda x0, x1: x0 + x1, [(1, 64), (1, 64)]),
            "softmax": (lambda x0: op.softmax(x0), [(1, 64)]),
            "sum": (lambda x0: op.sum(x0, axis=-1), [(100, 64)]),
            "max": (lambda x0: op.max(x0, axis=-1), [(100, 64)]),
            "norm": (norm, [(1, 64), (64,)]),
            "transpose": (lambda x0: op.permute_dims(x0), [(100, 64)]),
        }
    )
    assert all(kernels.rules.values())
    assert {rule for rules in kernels.rules.values() for rule in rules} == {None}


def test_two_products_and_what_comes_before_and_after() -> None:
    """What is not fused into a product's kernel stays outside, and right."""
    shapes = [(1, 1, 64), (128, 64), (32, 128)]
    kernels = Kernels(
        {"f": (lambda x0, x1, x2: op.softmax(product(product(op.silu(x0), x1), x2)), shapes)}
    )
    assert sorted(str(rule) for rule in kernels.rules["f"]) == ["None", "None", GEMV, GEMV]
    x, first, second = random(*shapes)
    inner = (x / (1 + np.exp(-x.astype(np.float64)))) @ first.T.astype(np.float64)
    powers = np.exp(inner @ second.T.astype(np.float64))
    np.testing.assert_allclose(kernels("f", x, first, second), powers / powers.sum(), rtol=1e-4)


@pytest.mark.parametrize("batch", [1, "n"])
def test_float16_is_no_worse_than_without_them(batch: int | str) -> None:
    x, weight = random((1, 1, 768), (100, 768), dtype="float16")
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    errors = []
    for rule_ids in ((MATMUL, GEMV), ()):
        shapes: Shapes = [(batch, 1, 768), (100, 768)]
        found = Kernels({"f": (product, shapes)}, rule_ids, "float16")("f", x, weight)
        assert found.dtype == np.float16
        errors.append(np.abs(found - exact).max())
    assert errors[0] <= errors[1]


@pytest.mark.parametrize(("rule_id", "declined"), [(GEMV, "n"), (MATMUL, "one")])
def test_each_has_its_own(rule_id: str, declined: str) -> None:
    functions: dict[str, tuple[Function, Shapes]] = {
        "one": (product, [(1, 1, 64), (100, 64)]),
        "n": (product, [("n", 1, 64), (100, 64)]),
    }
    rules = Kernels(functions, [rule_id]).rules
    assert rules[declined] == [None]
    assert sorted(rules) == ["n", "one"]
    assert [rule_id] in rules.values()


def test_only_for_llvm() -> None:
    """On a GPU they take nothing, whatever a profile says."""
    mod, target = fused_toy("cuda")
    defaults = {p.name: p.default for p in PARAMETERS}
    uses = [RuleUse(known_rules()[rule_id], defaults) for rule_id in (MATMUL, GEMV)]
    assert {entry.rule for entry in schedule(mod, uses, target)[1]} == {None}
