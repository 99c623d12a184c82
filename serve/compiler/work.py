"""How much a kernel computes and moves, derived from its TIR. Imports TVM, knows no schedule.

FLOP: every addition, subtraction, multiplication, division, minimum and maximum of floats is one;
so is every call of a function of floats (exp, tanh, sqrt, ...); a fused multiply-add is two.
Integers, comparisons, conversions, constants and the first value of a reduction are none. What a
loop does is counted once and multiplied by the loop's extent.

Bytes: the compulsory traffic. A tensor that is read, and one that is written, moves once, whole; or
where that is less, as many elements as the kernel touches: a gather, the pages of a sequence. One
that a kernel writes before it reads it is only written.

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

from tvm import tirx
from tvm.target import codegen

from serve.compiler.attention import attention_flop
from serve.compiler.counts import Polynomial, looped, smaller, varies_with, where
from serve.compiler.integers import (
    ARITHMETIC,
    LOGIC,
    Integers,
    NotCountableError,
    is_int,
    lanes_of,
    operator_of,
)

Site: TypeAlias = tuple[str, tuple[str, ...]]  # a parameter and the indices of one access to it
Accesses: TypeAlias = dict[Site, Polynomial]  # how often each is made

_NOTHING = {"AllocBuffer", "DeclBuffer", "AssertStmt"}
_FREE = {"reinterpret", "likely", "assume"}
_OPAQUE = ("extern", "packed", "address_of", "access_ptr")


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
    integers = Integers(func)
    counter = _Counter(integers)
    flop = attention_flop(kernel, integers.parameters)
    found: dict[str, Any] = {"parameters": integers.parameters, "flop": flop}
    try:
        work = counter.statement(func.body)
    except NotCountableError as reason:
        return found | {"bytes_read": None, "bytes_written": None, "uncounted": str(reason)}
    return found | {
        "flop": flop or str(work.flop),
        "bytes_read": str(counter.traffic(work.reads)),
        "bytes_written": str(counter.traffic(work.writes)),
    }


class _Counter:
    """Walks a function whose integers are known to `integers`."""

    def __init__(self, integers: Integers) -> None:
        self._integers = integers
        self._written: set[str] = set()

    def traffic(self, accesses: Accesses) -> Polynomial:
        """Bytes."""
        touched: dict[str, list[Polynomial]] = {}
        for (name, indices), count in accesses.items():
            touched.setdefault(name, []).append(smaller(self._region(name, indices), count))
        total = Polynomial()
        for name, elements in touched.items():
            itemsize, extents = self._integers.tensors[name]
            size = prod(extents, start=Polynomial.of(1))
            several = smaller(size, sum(elements, Polynomial()))
            total += Polynomial.of(itemsize) * (several if len(elements) > 1 else elements[0])
        return total

    def _region(self, name: str, indices: Sequence[str]) -> Polynomial:
        """How many elements an access can reach at most over all iterations."""
        region = Polynomial.of(1)
        for index, extent in zip(indices, self._integers.tensors[name][1], strict=True):
            loops, tensors = varies_with(index, self._integers.loops.keys())
            alone = re.fullmatch(r"(?:-?\d+ \+ )?(\w+)", index)
            if loops and alone and alone[1] in loops:
                region *= smaller(extent, self._integers.loops[alone[1]])
            elif loops or len(tensors) > 1:
                region *= extent
            elif tensors:  # an index out of a table: as many as the table has
                entries = prod(self._integers.tensors[tensors.pop()][1], start=Polynomial.of(1))
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
        name = self._integers.enter(node.loop_var, node.min, node.extent)
        with self._integers.passing():
            body = self.statement(node.body)
        return self.expression(node.extent) + body.loop(name, self._integers.loops[name])

    def _sblockrealize(self, node: Any) -> _Work:
        for axis, value in zip(node.block.iter_vars, node.iter_values, strict=True):
            self._integers.know(axis.var, value)
        if node.block.match_buffers:
            raise NotCountableError("a part of a tensor under another name")
        if node.block.init is not None:
            self.statement(node.block.init)  # is overwritten, not counted; but it fills the buffer
        return self._under(node.predicate, self.statement(node.block.body), _Work())

    def _ifthenelse(self, node: Any) -> _Work:
        with self._integers.passing():
            yes = self.statement(node.then_case)
        with self._integers.passing():
            no = _Work() if node.else_case is None else self.statement(node.else_case)
        return self._under(node.condition, yes, no)

    def _bind(self, node: Any) -> _Work:
        self._integers.know(node.var, node.value)
        return self.expression(node.value)

    def _attrstmt(self, node: Any) -> _Work:
        return self.statement(node.body)

    def _evaluate(self, node: Any) -> _Work:
        return self.expression(node.value)

    def _bufferstore(self, node: Any) -> _Work:
        work = self.expression(node.value)
        for index in node.indices:
            work += self.expression(index)
        name = self._integers.tensor(node.buffer)
        if name is not None:
            self._written.add(name)
            site = (name, self._integers.indices(node.indices))
            work += _Work(writes={site: Polynomial.of(lanes_of(node.value))})
        elif is_int(node.value):
            self._integers.store(node.buffer, node.indices, node.value)
        return work

    # -- expressions: their arithmetic

    def expression(self, node: Any) -> _Work:
        kind = type(node).__name__
        if kind in ARITHMETIC:
            return self._all((node.a, node.b), 0 if is_int(node) else lanes_of(node))
        if kind in LOGIC:
            return self._all((node.a, node.b))
        if kind == "TensorLoad":
            return self._all(node.indices) + self._load(node)
        if kind == "Call":
            return self._call(node)
        if kind == "Select":
            return self._branches(node.condition, node.true_value, node.false_value)
        if kind == "Let":
            self._integers.know(node.var, node.value)
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
        name = self._integers.tensor(node.source)
        if name is None or name in self._written:
            return _Work()
        site = (name, self._integers.indices(node.indices))
        return _Work(reads={site: Polynomial.of(lanes_of(node))})

    def _call(self, node: Any) -> _Work:
        name = operator_of(node)
        if name == "if_then_else":
            return self._branches(*node.args)
        if name.endswith(_OPAQUE):
            raise NotCountableError(name)
        if is_int(node) or name in _FREE:
            return self._all(node.args)
        if name.startswith("call_llvm"):
            name = str(codegen.llvm_get_intrinsic_name(int(node.args[0])))
        return self._all(node.args, (2 if "fma" in name else 1) * lanes_of(node))

    def _branches(self, condition: Any, yes: Any, no: Any) -> _Work:
        return self._under(condition, self.expression(yes), self.expression(no))

    def _under(self, condition: Any, yes: _Work, no: _Work) -> _Work:
        try:
            text: str | None = str(self._integers.index(condition))
        except NotCountableError:
            text = None
        if text in ("1", "True"):
            return yes
        return self.expression(condition) + yes.or_else(text, no)
