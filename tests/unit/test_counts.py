"""Counts as texts: how they are built, what they say, and a call's arguments in them."""

from __future__ import annotations

import numpy as np
import pytest

from serve.compiler.arguments import Argument, work_of
from serve.compiler.counts import (
    Polynomial,
    Value,
    at_least,
    evaluate,
    looped,
    smaller,
    varies_with,
    where,
)

pytestmark = pytest.mark.unit

Names = dict[str, Value]
N, M = Polynomial.of("n"), Polynomial.of("m")


def of(value: int | str) -> Polynomial:
    return Polynomial.of(value)


def test_products_are_multiplied_out() -> None:
    assert str((N + of(2)) * (M + of(3))) == "6 + 2*m + m*n + 3*n"
    assert str(N + of(-1) * N) == "0"
    assert N * M == M * N


def test_a_loop_multiplies_what_does_not_vary_and_sums_what_does() -> None:
    assert looped("i", N, of(4) * M) == of(4) * M * N
    triangle = looped("i", N, of("i") + of(1))
    assert str(triangle) == "n + sum(i, n, i)"
    assert evaluate(str(triangle), {"n": 322}) == 322 * 323 // 2
    assert looped("i", N, of("row_i")) == of("row_i") * N  # another name


def test_either_branch() -> None:
    assert where("c", N, N) == N
    assert evaluate(str(where("c > 0", N, M)), {"c": 1, "n": 5, "m": 7}) == 5
    assert evaluate(str(where("c > 0", N, M)), {"c": 0, "n": 5, "m": 7}) == 7
    assert evaluate(str(where(None, N, M)), {"n": 5, "m": 7}) == 7


def test_the_smaller_of_two_where_it_is_certain() -> None:
    assert at_least(of(4) * N * M, of(2) * N)
    assert not at_least(N, N * M)
    assert not at_least(N + of(-1) * M, N)
    assert not at_least(N * of("sum(i, m, i)"), N)  # which may be 0
    assert smaller(of(64) * N, of(64)) == of(64)
    assert smaller(of(64), of(64) * N) == of(64)
    assert str(smaller(N, M)) == "min(n, m)"


def test_loops_within_loops_and_tensors() -> None:
    """The lengths of sequences, from where each begins."""
    begins = np.array([0, 3, 3, 10])
    names: Names = {"batch": 3, "begins": begins, "heads": 2}
    length = "begins[b + 1] - begins[b]"
    assert evaluate(f"sum(b, batch, {length})", names) == 10
    pairs = f"heads*sum(b, batch, sum(i, {length}, sum(j, i + 1, 1)))"
    assert evaluate(pairs, names) == 2 * (3 * 4 // 2 + 7 * 8 // 2)
    assert evaluate("sum(b, 0, begins[b])", names) == 0
    assert evaluate("sum(b, -3, 1)", names) == 0


def test_an_index_outside_of_a_branch_not_taken() -> None:
    names: Names = {"n": 5, "t": np.array([2, 4])}
    assert evaluate("sum(i, n, where(i < 2, t[i], 0))", names) == 6


def test_integer_division_and_logic() -> None:
    assert evaluate("((17) // (4)) + ((17) % (4))", {}) == 5
    assert evaluate("sum(i, 10, ((i < 3) | (i > 7)) & (i != 8))", {}) == 4
    with pytest.raises(KeyError):
        evaluate("n", {})


def test_what_an_index_varies_with() -> None:
    loops = {"i", "j"}
    assert varies_with("3 + i*n", loops) == ({"i"}, set())
    assert varies_with("table[start[i] + j]", loops) == (set(), {"table"})
    assert varies_with("layer", loops) == (set(), set())


def test_arguments_give_the_names_their_values() -> None:
    work = {
        "parameters": [
            ["x", "float32", ["n", "64"]],
            ["begins", "int32", ["1 + batch"]],
            ["layer", "int64", None],
            ["scale", "float32", None],
        ],
        "flop": "2*n + begins[1] + batch + layer",
        "bytes_read": "4*n",
        "bytes_written": None,
    }
    x, begins = ((5, 64), None), ((4,), np.array([0, 7, 8, 9]))
    arguments: list[Argument] = [x, begins, 100, 0.5]
    assert work_of(work, arguments) == (10 + 7 + 3 + 100, 20, None)
    arguments[1] = ((4,), None)  # its values were not kept
    assert work_of(work, arguments) == (None, 20, None)
    assert work_of({}, arguments) == (None, None, None)
