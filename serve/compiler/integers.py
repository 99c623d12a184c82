"""The integers of a TIR function as counts: extents, conditions, indices. Imports TVM.

What a local buffer of integers holds is known as far as it was stored there unconditionally.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx

from serve.compiler.counts import RESERVED, Polynomial, where

ARITHMETIC = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "//", "FloorDiv": "//", "Mod": "%"}
ARITHMETIC |= {"FloorMod": "%", "Min": "min", "Max": "max"}
LOGIC = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}
LOGIC |= {"And": "&", "Or": "|"}


class NotCountableError(Exception):
    """The kernel has something that is not counted here; says what."""


class Integers:
    """Names and values in one function.

    `tensors`: bytes of an element and the shape of each parameter that is a tensor; `parameters`:
    as in the manifest; `loops`: the extents of the loops met so far.
    """

    def __init__(self, func: tirx.PrimFunc) -> None:
        self._taken = set(RESERVED)
        self._names: dict[Any, str] = {}
        self._values: dict[Any, Polynomial | None] = {}  # that got a name; None: not known
        self._stored: dict[str, Polynomial] = {}  # in local buffers
        self.loops: dict[str, Polynomial] = {}
        self.tensors: dict[str, tuple[int, Sequence[Polynomial]]] = {}
        self.parameters: list[list[Any]] = []
        shapes = [getattr(p.ty, "shape", None) for p in func.params]
        names = [self._name(p) for p in func.params]
        for parameter, name, shape in zip(func.params, names, shapes, strict=True):
            dtype = str(parameter.ty.dtype)
            if shape is None:
                self.parameters.append([name, dtype, None])
                continue
            extents = [self.index(extent) for extent in shape]
            self.tensors[name] = (tvm.DataType(dtype).itemsize, extents)
            self.parameters.append([name, dtype, [str(extent) for extent in extents]])

    def tensor(self, buffer: Any) -> str | None:
        """The name of a parameter; None for a buffer of the function's own."""
        name = self._names.get(buffer)
        return name if name in self.tensors else None

    def know(self, variable: Any, value: Any) -> None:
        """From here on the variable has this value, if it is an integer."""
        if is_int(value):
            try:
                self._values[variable] = self.index(value)
            except NotCountableError:
                self._values[variable] = None

    def enter(self, variable: Any, begin: Any, extent: Any) -> str:
        """A loop's variable; gives its name."""
        name = self._name(variable)
        self._values[variable] = self.index(begin) + Polynomial.of(name)
        self.loops[name] = self.index(extent)
        return name

    def store(self, buffer: Any, indices: Sequence[Any], value: Any) -> None:
        place = self._place(buffer, indices)
        self._stored.pop(place, None)  # what is made from its old value is not known
        try:
            self._stored[place] = self.index(value)
        except NotCountableError:
            return

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A branch or a loop: what is stored in it is not known after it."""
        before = dict(self._stored)
        yield
        self._stored = {k: v for k, v in before.items() if self._stored.get(k) is v}

    def indices(self, nodes: Sequence[Any]) -> tuple[str, ...]:
        return tuple(str(self.index(node)) for node in nodes)

    def index(self, node: Any) -> Polynomial:
        """An integer's value. Raises NotCountableError if it is known only in the kernel."""
        kind = type(node).__name__
        if kind == "IntImm":
            return Polynomial.of(int(node.value))
        if kind == "Var":
            value = self._values.get(node, Polynomial.of(self._name(node)))
            if value is None:
                raise NotCountableError("an integer made from floats")
            return value
        if kind in ARITHMETIC and is_int(node):
            return self._arithmetic(ARITHMETIC[kind], self.index(node.a), self.index(node.b))
        if kind in LOGIC:
            sign = LOGIC[kind]
            return Polynomial.of(f"(({self.index(node.a)}) {sign} ({self.index(node.b)}))")
        if kind == "Not":
            return Polynomial.of(f"(({self.index(node.a)}) == 0)")
        if kind == "Cast" and is_int(node.value):
            return self.index(node.value)
        if kind == "TensorLoad" and is_int(node):
            return self._element(node)
        if kind == "Select":
            return self._either(node.condition, node.true_value, node.false_value)
        if kind == "Call" and operator_of(node) == "if_then_else":
            return self._either(*node.args)
        if kind == "Ramp":  # lanes: what an access reaches is the same
            return self.index(node.base)
        raise NotCountableError(f"the value of {kind}")

    @staticmethod
    def _arithmetic(sign: str, a: Polynomial, b: Polynomial) -> Polynomial:
        if sign == "+":
            return a + b
        if sign == "-":
            return a + Polynomial.of(-1) * b
        if sign == "*":
            return a * b
        text = f"{sign}({a}, {b})" if sign in ("min", "max") else f"(({a}) {sign} ({b}))"
        return Polynomial.of(text)

    def _element(self, node: Any) -> Polynomial:
        place = self._place(node.source, node.indices)
        if self.tensor(node.source) is not None:
            return Polynomial.of(place)
        try:
            return self._stored[place]
        except KeyError:
            raise NotCountableError("an integer that is computed in a local buffer") from None

    def _either(self, condition: Any, yes: Any, no: Any) -> Polynomial:
        return where(str(self.index(condition)), self.index(yes), self.index(no))

    def _place(self, buffer: Any, indices: Sequence[Any]) -> str:
        return f"{self._name(buffer)}[{', '.join(self.indices(indices))}]"

    def _name(self, variable: Any) -> str:
        """A name that is nobody else's in this kernel."""
        if variable not in self._names:
            wanted = re.sub(r"\W", "_", str(variable.name)) or "unnamed"
            names = (wanted, *(f"{wanted}_{i}" for i in range(1, 10_000)))
            self._names[variable] = next(name for name in names if name not in self._taken)
            self._taken.add(self._names[variable])
        return self._names[variable]


def operator_of(node: Any) -> str:
    """A call's, without its dialect: `if_then_else`, `exp2`."""
    return str(getattr(node.op, "name", node.op)).rpartition(".")[2]


def _dtype(node: Any) -> Any:
    return tvm.DataType(str(node.ty.dtype))


def is_int(node: Any) -> bool:
    return not str(_dtype(node)).startswith(("float", "bfloat"))


def lanes_of(node: Any) -> int:
    return max(1, int(_dtype(node).lanes))
