"""exp2, exp, tanh, erf and sigmoid as arithmetic: against float64, over all of float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx
from tvm.ir import Call
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as I  # noqa: N812

from profiles.cpu import vector_math
from tests.compiler.conftest import CPUS, target_for

pytestmark = pytest.mark.compiler

Array = NDArray[Any]
FINITE_MAX = float(np.finfo(np.float32).max)
NORMAL_MIN = 2.0**-126


def _erf(x: Array) -> Array:
    result: Array = torch.erf(torch.from_numpy(x)).numpy()
    return result


# name: in float64, and how many units in the last place ours may be off
FUNCTIONS: dict[str, tuple[Callable[[Array], Array], float]] = {
    "exp2": (np.exp2, 1.5),
    "exp": (np.exp, 1.5),
    "tanh": (np.tanh, 6),
    "erf": (_erf, 7),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 2.5),
}
# Of the largest powers, from 2^127.5 on: there is no 2^128 to take them from.
LARGEST, ULPS_OF_LARGEST = 2.0**127.5, 12.5

# Every 1,021st number of float32, infinities and NaNs among them, and the edges of each function.
ALL = np.arange(0, 2**32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)
EDGES = np.array(
    [
        0.0, -0.0, 1e-45, -1e-45, 1e-38, NORMAL_MIN, -NORMAL_MIN, FINITE_MAX, -FINITE_MAX,
        math.inf, -math.inf, math.nan,
        *(float(np.nextafter(np.float32(x), np.float32(to)))
          for x in (
              -126, 127, 127.5, 128, -126 * math.log(2), 128 * math.log(2), 127.5 * math.log(2),
              9, -9, 4, -4, 0.5, -0.5, math.log(2) / 2,
          )
          for to in (-math.inf, x, math.inf)),
    ],
    np.float32,
)  # fmt: skip
INPUTS = np.resize(np.concatenate([EDGES, ALL]), (len(EDGES) + len(ALL)) // 16 * 16)


def loops(function: Callable[[Any], Any], lanes: int) -> tirx.PrimFunc:
    """y[i] = function(x[i]) over INPUTS, in vectors."""
    size = len(INPUTS)
    with IRBuilder() as builder, I.prim_func(s_tir=True):
        I.func_name("main")
        x = I.arg("x", I.buffer((size,), "float32"))
        y = I.arg("y", I.buffer((size,), "float32"))
        with I.serial(0, size // lanes) as vector, I.vectorized(0, lanes) as lane:
            at = vector * lanes + lane
            I.buffer_store(y, function(x[at]), [at])
    return builder.get().with_attr("global_symbol", "main")


@cache
def outputs(name: str, cpu: str, lanes: int) -> Array:
    """Of INPUTS, on that processor's instructions."""
    func = loops(getattr(vector_math, name), lanes)
    library = tvm.compile(tvm.IRModule({"main": func}), target=target_for(cpu))
    y = tvm.runtime.tensor(np.full(INPUTS.shape, 77, np.float32))
    library["main"](tvm.runtime.tensor(INPUTS), y)
    found: Array = y.numpy()
    return found


@pytest.fixture(params=CPUS)
def cpu(request: pytest.FixtureRequest) -> str:
    target_for(request.param)
    name: str = request.param
    return name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_float64(name: str, cpu: str) -> None:
    reference, ulps = FUNCTIONS[name]
    found = outputs(name, cpu, 16)
    with np.errstate(all="ignore"):
        exact = reference(INPUTS.astype(np.float64))
        rounded = exact.astype(np.float32)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(rounded))
        np.testing.assert_array_equal(np.isinf(found), np.isinf(rounded))
        np.testing.assert_array_equal(np.sign(found[np.isinf(found)]), 1)
        sizes = np.abs(exact)
        regular = np.isfinite(rounded) & (sizes >= NORMAL_MIN)
        error = np.abs(found - exact)[regular] / np.spacing(np.abs(rounded[regular]))
    allowed = np.where(sizes[regular] >= LARGEST, ULPS_OF_LARGEST, ulps)
    assert np.all(error <= allowed)
    assert np.median(error) <= 0.5  # as a correctly rounded function's, mostly
    assert np.all(np.abs(found[sizes < NORMAL_MIN]) <= NORMAL_MIN)


@pytest.mark.parametrize("name", ["exp", "exp2"])
def test_powers_below_the_smallest_normal_number_are_zero(name: str, cpu: str) -> None:
    """And those of numbers next to 0 are 1, denormal or not."""
    found = outputs(name, cpu, 16)
    low = -126 if name == "exp2" else -126 * math.log(2)
    assert not found[np.float32(low) > INPUTS].any()
    np.testing.assert_array_equal(found[np.abs(INPUTS) < 1e-9], 1)
    assert np.all(found[(np.float32(low) <= INPUTS) & (INPUTS < 88)] > 0)


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_odd_functions_are_odd_and_end_at_one(name: str, cpu: str) -> None:
    found = outputs(name, cpu, 16)
    at = dict(zip(INPUTS.tolist()[: len(EDGES)], found.tolist(), strict=False))
    assert (at[math.inf], at[-math.inf]) == (at[FINITE_MAX], at[-FINITE_MAX])
    assert at[math.inf] == pytest.approx(1, abs=2e-7)
    for x, y in at.items():
        if -x in at and not math.isnan(x):
            assert at[-x] == -y
    assert np.all(np.abs(found[np.isfinite(found)]) <= 1 + 2e-7)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_the_same_bits_in_vectors_of_any_size(name: str, cpu: str, lanes: int) -> None:
    assert outputs(name, cpu, lanes).tobytes() == outputs(name, cpu, 16).tobytes()


def calls_in(expression: Any) -> list[tuple[str, str]]:
    """The names and types of what is called."""
    found: list[tuple[str, str]] = []

    def visit(call: Call) -> None:
        found.append((call.op.name.partition(".")[2], str(call.ty.dtype)))

    tvm_ffi.structural_walk(expression, (Call, visit))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_are_replaced(name: str) -> None:
    call = getattr(tirx, name)
    x = tirx.Var("x", "float32")
    replaced = vector_math.vectorizable(call(x) + call(x * call(x)))
    assert (name, "float32") in calls_in(call(x))
    assert {called for called, _ in calls_in(replaced)} <= {"reinterpret", "shift_left", "floor"}


def test_calls_in_calls_are_replaced() -> None:
    """Whatever they are nested in; sigmoid's own exp too."""
    x = tirx.Var("x", "float32")
    nested: Any = x
    for name in (*FUNCTIONS, *reversed(FUNCTIONS)):
        nested = getattr(tirx, name)(nested * 2) + 1
    replaced = vector_math.vectorizable(tirx.sqrt(nested))
    left = {called for called, _ in calls_in(replaced)}
    assert left <= {"reinterpret", "shift_left", "floor", "sqrt"}
    assert "sqrt" in left


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_types_are_left_alone(name: str, dtype: str) -> None:
    call = getattr(tirx, name)(tirx.Var("x", dtype))
    assert calls_in(vector_math.vectorizable(call)) == calls_in(call)
    assert (name, dtype) in calls_in(call)


def test_what_is_not_known_is_left_alone() -> None:
    x = tirx.Var("x", "float32")
    for call in (tirx.log(x), tirx.sin(x), tirx.if_then_else(x > 0, x, -x)):
        assert calls_in(vector_math.vectorizable(call)) == calls_in(call)
