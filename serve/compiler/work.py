"""How much a kernel computes and moves, derived from its TIR. Imports TVM, knows no schedule.

FLOP: every addition, subtraction, multiplication, division, minimum and maximum of floats is one;
so is every call of a function of floats (exp, tanh, sqrt, ...); a fused multiply-add is two.
Integers, comparisons, conversions, constants and the first value of a reduction are none. What a
loop does is counted once and multiplied by the loop's extent.

Bytes: the compulsory traffic. A tensor that is read, and one that is written, moves once, whole; or
where that is less, as many elements as the kernel touches: a gather, the pages of a sequence. One
that a kernel fills before it reads it is only written.

Counts are texts, in serve/compiler/counts.py's language, over the kernel's shape variables and the
values of its integer parameters, on which extents and conditions may depend; a condition on floats
counts its dearer branch. The FLOP of attention are not counted here but are what
serve/compiler/attention.py says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import tvm
from tvm import tirx
from tvm.target import codegen

from serve.compiler.attention import attention_flop
from serve.compiler.counts import RESERVED, Polynomial, looped, smaller, varies_with, where

Site: TypeAlias = tuple[str, tuple[str, ...]]  # a parameter and the indices of one access to it
Accesses: TypeAlias = dict[Site, Polynomial]  # how often each is made

_ARITHMETIC = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "//", "FloorDiv": "//", "Mod": "%"}
_ARITHMETIC |= {"FloorMod": "%", "Min": "min", "Max": "max"}
_COMPARISONS = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}
_LOGIC = {"And": "&", "Or": "|"}
_NOTHING = {"AllocBuffer", "DeclBuffer", "AssertStmt", "Break", "Continue"}
_FREE = {"reinterpret", "likely", "assume"}
_OPAQUE = ("extern", "packed", "address_of", "access_ptr")


class NotCountableError(Exception):
    """The kernel has something that is not counted here; says what."""


@dataclass
class _Work:
    flop: Polynomial = field(default_factory=Polynomial)
    reads: Accesses = field(default_factory=dict)
    writes: Accesses = field(default_factory=dict)

    def __add__(self, other: _Work) -> _Work:
        zero = Polynomial()
        return self._both(other, lambda a, b: (a or zero) + (b or zero))

    def loop(self, variable: str, extent: Polynomial) -> _Work:
        def over(count: Polynomial) -> Polynomial:
            return looped(variable, extent, count)

        return _Work(over(self.flop), _each(self.reads, over), _each(self.writes, over))

    def or_else(self, condition: str | None, other: _Work) -> _Work:
        """This if the condition holds, else the other; without a condition the larger."""
        zero = Polynomial()
        return self._both(other, lambda a, b: where(condition, a or zero, b or zero))

    def _both(self, other: _Work, merge: Callable[[Any, Any], Polynomial]) -> _Work:
        def merged(a: Accesses, b: Accesses) -> Accesses:
            return {site: merge(a.get(site), b.get(site)) for site in {**a, **b}}

        return _Work(
            merge(self.flop, other.flop),
            merged(self.reads, other.reads),
            merged(self.writes, other.writes),
        )


def _each(accesses: Accesses, change: Callable[[Polynomial], Polynomial]) -> Accesses:
    return {site: change(count) for site, count in accesses.items()}


def count_work(kernel: str, func: tirx.PrimFunc) -> dict[str, Any]:
    """The kernel's work, as JSON keeps it.

    `parameters`: [name, dtype, shape] in calling order, a shape being a list of texts, or None for
    a scalar; `flop`, `bytes_read`, `bytes_written`: counts, None where `uncounted` says why.
    """
    counter = _Counter(func)
    found: dict[str, Any] = {"parameters": counter.parameters}
    try:
        work = counter.statement(func.body)
    except NotCountableError as reason:
        return found | {
            "flop": None, "bytes_read": None, "bytes_written": None, "uncounted": str(reason),
        }  # fmt: skip
    return found | {
        "flop": attention_flop(kernel, counter.parameters) or str(work.flop),
        "bytes_read": str(counter.traffic(work.reads)),
        "bytes_written": str(counter.traffic(work.writes)),
    }


class _Counter:
    """Walks one function. `tensors`: the parameters that are tensors, by name."""

    def __init__(self, func: tirx.PrimFunc) -> None:
        self._taken = set(RESERVED)
        self._names: dict[Any, str] = {}
        self._values: dict[Any, Polynomial] = {}  # of integers that were given a name
        self._stored: dict[str, Polynomial] = {}  # of integers in local buffers
        self._filled: set[str] = set()
        self._loops: dict[str, Polynomial] = {}
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

    def traffic(self, accesses: Accesses) -> Polynomial:
        """Bytes."""
        touched: dict[str, list[Polynomial]] = {}
        for (name, indices), count in accesses.items():
            touched.setdefault(name, []).append(smaller(self._region(name, indices), count))
        total = Polynomial()
        for name, elements in touched.items():
            itemsize, extents = self.tensors[name]
            size = prod(extents, start=Polynomial.of(1))
            several = smaller(size, sum(elements, Polynomial()))
            total += Polynomial.of(itemsize) * (several if len(elements) > 1 else elements[0])
        return total

    def _region(self, name: str, indices: Sequence[str]) -> Polynomial:
        """How many elements an access can reach at most over all iterations."""
        region = Polynomial.of(1)
        for index, extent in zip(indices, self.tensors[name][1], strict=True):
            loops, tensors = varies_with(index, self._loops.keys())
            alone = re.fullmatch(r"(?:-?\d+ \+ )?(\w+)", index)
            if loops and alone and alone[1] in loops:
                region *= smaller(extent, self._loops[alone[1]])
            elif loops or len(tensors) > 1:
                region *= extent
            elif tensors:  # an index out of a table: as many as the table has
                entries = prod(self.tensors[tensors.pop()][1], start=Polynomial.of(1))
                region *= smaller(extent, entries)
        return region

    # -- statements

    def statement(self, node: Any) -> _Work:
        kind = type(node).__name__
        visit = getattr(self, f"_{kind.lower()}", None)
        if visit is not None:
            work: _Work = visit(node)
            return work
        if kind in _NOTHING:
            return _Work()
        raise NotCountableError(kind)

    def _seqstmt(self, node: Any) -> _Work:
        return sum((self.statement(part) for part in node.seq), _Work())

    def _for(self, node: Any) -> _Work:
        if node.step is not None and str(node.step) != "1":
            raise NotCountableError("a loop with a step")
        name = self._name(node.loop_var)
        self._values[node.loop_var] = self.index(node.min) + Polynomial.of(name)
        extent = self.index(node.extent)
        self._loops[name] = extent
        return self.expression(node.extent) + self.statement(node.body).loop(name, extent)

    def _sblockrealize(self, node: Any) -> _Work:
        for axis, value in zip(node.block.iter_vars, node.iter_values, strict=True):
            self._values[axis.var] = self.index(value)
        if node.block.match_buffers:
            raise NotCountableError("a part of a tensor under another name")
        if node.block.init is not None:
            self.statement(node.block.init)  # is overwritten, not counted; but it fills the buffer
        return self._under(node.predicate, self.statement(node.block.body), _Work())

    def _ifthenelse(self, node: Any) -> _Work:
        other = _Work() if node.else_case is None else self.statement(node.else_case)
        return self._under(node.condition, self.statement(node.then_case), other)

    def _bind(self, node: Any) -> _Work:
        self._know(node.var, node.value)
        return self.expression(node.value)

    def _attrstmt(self, node: Any) -> _Work:
        return self.statement(node.body)

    def _evaluate(self, node: Any) -> _Work:
        return self.expression(node.value)

    def _bufferstore(self, node: Any) -> _Work:
        work = self.expression(node.value)
        for index in node.indices:
            work += self.expression(index)
        name = self._names.get(node.buffer)
        if name in self.tensors:
            self._filled.add(name)
            site = (name, self._indices(node.indices))
            work += _Work(writes={site: Polynomial.of(_lanes(node.value))})
        elif _is_int(node.value):
            self._stored[self._place(node.buffer, node.indices)] = self.index(node.value)
        return work

    # -- expressions: their arithmetic

    def expression(self, node: Any) -> _Work:
        kind = type(node).__name__
        if kind in _ARITHMETIC:
            return self._all((node.a, node.b), 0 if _is_int(node) else _lanes(node))
        if kind in _COMPARISONS or kind in _LOGIC:
            return self._all((node.a, node.b))
        if kind == "TensorLoad":
            return self._all(node.indices) + self._load(node)
        if kind == "Call":
            return self._call(node)
        if kind == "Select":
            return self._branches(node.condition, node.true_value, node.false_value)
        if kind == "Let":
            self._know(node.var, node.value)
            return self._all((node.value, node.body))
        if kind in ("Cast", "Broadcast", "Not"):
            return self.expression(node.a if kind == "Not" else node.value)
        if kind == "Ramp":
            return self._all((node.base, node.stride))
        if kind in ("Var", "IntImm", "FloatImm", "StringImm"):
            return _Work()
        raise NotCountableError(kind)

    def _all(self, nodes: Sequence[Any], flop: int = 0) -> _Work:
        return sum((self.expression(node) for node in nodes), _Work(Polynomial.of(flop)))

    def _load(self, node: Any) -> _Work:
        name = self._names.get(node.source)
        if name not in self.tensors or name in self._filled:
            return _Work()
        site = (name, self._indices(node.indices))
        return _Work(reads={site: Polynomial.of(_lanes(node))})

    def _call(self, node: Any) -> _Work:
        name = _operator(node)
        if name == "if_then_else":
            return self._branches(*node.args)
        if name.endswith(_OPAQUE):
            raise NotCountableError(name)
        if _is_int(node) or name in _FREE:
            return self._all(node.args)
        if name.startswith("call_llvm"):
            name = str(codegen.llvm_get_intrinsic_name(int(node.args[0])))
        return self._all(node.args, (2 if "fma" in name else 1) * _lanes(node))

    def _branches(self, condition: Any, yes: Any, no: Any) -> _Work:
        return self._under(condition, self.expression(yes), self.expression(no))

    def _under(self, condition: Any, yes: _Work, no: _Work) -> _Work:
        try:
            text: str | None = str(self.index(condition))
        except NotCountableError:
            text = None
        if text in ("1", "True"):
            return yes
        return self.expression(condition) + yes.or_else(text, no)

    # -- integers: their values

    def index(self, node: Any) -> Polynomial:
        """An integer's value. Raises NotCountableError if it is known only in the kernel."""
        kind = type(node).__name__
        if kind == "IntImm":
            return Polynomial.of(int(node.value))
        if kind == "Var":
            value = self._values.get(node)
            return Polynomial.of(self._name(node)) if value is None else value
        if kind in _ARITHMETIC and _is_int(node):
            return self._arithmetic(_ARITHMETIC[kind], self.index(node.a), self.index(node.b))
        if kind in _COMPARISONS | _LOGIC:
            sign = (_COMPARISONS | _LOGIC)[kind]
            return Polynomial.of(f"(({self.index(node.a)}) {sign} ({self.index(node.b)}))")
        if kind == "Not":
            return Polynomial.of(f"(({self.index(node.a)}) == 0)")
        if kind == "Cast" and _is_int(node.value):
            return self.index(node.value)
        if kind == "TensorLoad" and _is_int(node):
            return self._element(node)
        if kind == "Select":
            return self._either(node.condition, node.true_value, node.false_value)
        if kind == "Call" and _operator(node) == "if_then_else":
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
        name = self._names.get(node.source)
        if name in self.tensors:
            return Polynomial.of(self._place(node.source, node.indices))
        try:
            return self._stored[self._place(node.source, node.indices)]
        except KeyError:
            raise NotCountableError("an integer that is computed in a local buffer") from None

    def _either(self, condition: Any, yes: Any, no: Any) -> Polynomial:
        return where(str(self.index(condition)), self.index(yes), self.index(no))

    def _know(self, variable: Any, value: Any) -> None:
        if _is_int(value):
            self._values[variable] = self.index(value)

    def _place(self, buffer: Any, indices: Sequence[Any]) -> str:
        return f"{self._name(buffer)}[{', '.join(self._indices(indices))}]"

    def _indices(self, indices: Sequence[Any]) -> tuple[str, ...]:
        return tuple(str(self.index(i)) for i in indices)

    def _name(self, variable: Any) -> str:
        """A name that is nobody else's in this kernel."""
        if variable not in self._names:
            wanted = re.sub(r"\W", "_", str(variable.name)) or "unnamed"
            names = (wanted, *(f"{wanted}_{i}" for i in range(1, 10_000)))
            self._names[variable] = next(name for name in names if name not in self._taken)
            self._taken.add(self._names[variable])
        return self._names[variable]


def _operator(node: Any) -> str:
    """A call's, without its dialect: `if_then_else`, `exp2`."""
    return str(getattr(node.op, "name", node.op)).rpartition(".")[2]


def _dtype(node: Any) -> Any:
    return tvm.DataType(str(node.ty.dtype))


def _is_int(node: Any) -> bool:
    return not str(_dtype(node)).startswith(("float", "bfloat"))


def _lanes(node: Any) -> int:
    return max(1, int(_dtype(node).lanes))
