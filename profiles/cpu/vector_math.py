"""exp2, exp, tanh and erf as arithmetic that vectorizes. Imports TVM.

LLVM turns its own intrinsics into one call of libm for each lane. These are polynomials and
rationals in f32, good to a few units in the last place (tests/compiler/test_vector_math.py), powers
above 2^127.5 to a dozen. Powers that f32 could only hold as denormals are 0, NaN stays NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Op
from tvm.tirx import Expr

_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; n * high is exact
_EXP = tuple(1 / math.factorial(n) for n in range(8))  # Taylor's, for |r| <= ln 2 / 2
# tanh and erf: odd / even polynomials in x, lowest power first; fitted by Eigen (MPL 2.0)
_TANH = (
    (
        *(4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05),
        *(5.12229709037114e-08, -8.60467152213735e-11, 2.00018790482477e-13),
        -2.76076847742355e-16,
    ),
    (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06),
    9.0,
)
_ERF = (
    (
        *(-1.60960333262415e-02, -2.95459980854025e-03, -7.34990630326855e-04),
        *(-5.69250639462346e-05, -2.10102402082508e-06, 2.77068142495902e-08),
        -2.72614225801306e-10,
    ),
    (
        *(-1.42647390514189e-02, -7.37332916720468e-03, -1.68282697438203e-03),
        *(-2.13374055278905e-04, -1.45660718464996e-05),
    ),
    4.0,
)


def exp2(x: Expr) -> Expr:
    """2^x."""
    return _once(x, _exp2)


def exp(x: Expr) -> Expr:
    """e^x."""
    return _once(x, _exp)


def tanh(x: Expr) -> Expr:
    return _once(x, lambda value: _odd_rational(value, *_TANH))


def erf(x: Expr) -> Expr:
    return _once(x, lambda value: _odd_rational(value, *_ERF))


def sigmoid(x: Expr) -> Expr:
    return _f32(1) / (_f32(1) + exp(-x))


def _once(x: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """function(x), with x computed once however often the function uses it."""
    value = tirx.Var("value", "float32")
    return tirx.Let(value, x, function(value))


def _exp2(x: Expr) -> Expr:
    n = tirx.min(tirx.floor(x + _f32(0.5)), _f32(127))
    power = _polynomial((x - n) * _f32(math.log(2)), _EXP) * _power_of_two(n)
    return _in_range(x, power, -126.0, 128.0)


def _exp(x: Expr) -> Expr:
    n = tirx.min(tirx.floor(x * _f32(math.log2(math.e)) + _f32(0.5)), _f32(127))
    rest = x - n * _f32(_LN2_HIGH) - n * _f32(_LN2_LOW)
    power = _polynomial(rest, _EXP) * _power_of_two(n)
    return _in_range(x, power, -126 * math.log(2), 128 * math.log(2))


def vectorizable(value: Expr) -> Expr:
    """The expression with every f32 call of these functions replaced."""

    def replace(call: Call) -> Expr:
        name = call.op.name.partition(".")[2] if isinstance(call.op, Op) else ""
        is_known = name in _REPLACED and str(call.ty.dtype) == "float32"
        return _REPLACED[name](call.args[0]) if is_known else call

    return tvm_ffi.structural_map(value, (Call, replace))


_REPLACED = {"exp2": exp2, "exp": exp, "tanh": tanh, "erf": erf, "sigmoid": sigmoid}


def _f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's scheme; lowest power first."""
    *lower, total = (_f32(c) for c in coefficients)
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


def _power_of_two(n: Expr) -> Expr:
    """2^n of a whole number in f32, by its exponent's bits; 128 gives infinity."""
    bounded = tirx.max(tirx.min(n, _f32(128)), _f32(-127))
    return tirx.reinterpret("float32", (bounded.astype("int32") + 127) << 23)


def _in_range(x: Expr, power: Expr, low: float, high: float) -> Expr:
    finite = tirx.Select(x < _f32(low), _f32(0), power)
    return tirx.Select(x >= _f32(high), _f32(math.inf), finite)


def _odd_rational(x: Expr, odd: Sequence[float], even: Sequence[float], limit: float) -> Expr:
    """x * (odd(x^2) / even(x^2)), where the function is not yet ±1.

    The quotient first: a small x times the first coefficient would be a denormal.
    """
    inside = tirx.Select(
        x > _f32(limit), _f32(limit), tirx.Select(x < _f32(-limit), _f32(-limit), x)
    )
    square = inside * inside
    return inside * (_polynomial(square, odd) / _polynomial(square, even))
