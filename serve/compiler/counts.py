"""Counts as texts: what a kernel's work is before its shapes are known, and its value then.

A text is arithmetic over names, in Python's syntax, with `name[i]` for an element of an integer
tensor, `min`, `max`, `where(condition, a, b)`, and `sum(i, n, body)` for the sum of body over
0 <= i < n. Knows nothing of TVM.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from keyword import kwlist
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Value: TypeAlias = "int | NDArray[np.int64]"
Environment: TypeAlias = "Mapping[str, Value]"

RESERVED = frozenset({"sum", "min", "max", "where", *kwlist})
_NAME = re.compile(r"[A-Za-z_]\w*")


class Polynomial:
    """A sum of products: products of atoms, sorted, and the number of each.

    An atom is a name, or a text that is no polynomial, such as `min(a, b)`.
    """

    def __init__(self, terms: Mapping[tuple[str, ...], int] | None = None) -> None:
        self.terms = {atoms: times for atoms, times in (terms or {}).items() if times}

    @classmethod
    def of(cls, value: int | str) -> Polynomial:
        return cls({(): value} if isinstance(value, int) else {(value,): 1})

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for atoms, times in other.terms.items():
            terms[atoms] = terms.get(atoms, 0) + times
        return Polynomial(terms)

    def __mul__(self, other: Polynomial) -> Polynomial:
        total = Polynomial()
        for a, times_a in self.terms.items():
            for b, times_b in other.terms.items():
                total += Polynomial({tuple(sorted(a + b)): times_a * times_b})
        return total

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and self.terms == other.terms

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        parts = []
        for atoms, times in sorted(self.terms.items()):
            factors = [str(times)] if times != 1 or not atoms else []
            parts.append("*".join((*factors, *atoms)))
        return " + ".join(parts) or "0"


def mentions(atoms: tuple[str, ...], name: str) -> bool:
    return any(name in _NAME.findall(atom) for atom in atoms)


def looped(variable: str, extent: Polynomial, body: Polynomial) -> Polynomial:
    """The sum of `body` over 0 <= variable < extent."""
    fixed = {a: n for a, n in body.terms.items() if not mentions(a, variable)}
    varying = {a: n for a, n in body.terms.items() if a not in fixed}
    total = Polynomial(fixed) * extent
    if varying:
        total += Polynomial.of(f"sum({variable}, {extent}, {Polynomial(varying)})")
    return total


def where(condition: str | None, yes: Polynomial, no: Polynomial) -> Polynomial:
    """One or the other; without a condition, the larger."""
    if yes == no:
        return yes
    if condition is None:
        return Polynomial.of(f"max({yes}, {no})")
    return Polynomial.of(f"where({condition}, {yes}, {no})")


def smaller(a: Polynomial, b: Polynomial) -> Polynomial:
    if at_least(b, a):
        return a
    return b if at_least(a, b) else Polynomial.of(f"min({a}, {b})")


def varies_with(text: str, names: Set[str]) -> tuple[set[str], set[str]]:
    """Of these names, which the text mentions outside of indices; and the tensors it indexes."""
    found: set[str] = set()
    tensors: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Subscript):
            assert isinstance(node.value, ast.Name)
            tensors.add(node.value.id)
            return
        if isinstance(node, ast.Name) and node.id in names:
            found.add(node.id)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(_parsed(text))
    return found, tensors


def at_least(a: Polynomial, b: Polynomial) -> bool:
    """Whether a >= b for certain, every name being at least 1. b: one product."""
    if len(b.terms) != 1 or any(times < 0 for times in a.terms.values()):
        return False
    ((product, times),) = b.terms.items()
    plain = _NAME.fullmatch
    return any(
        n >= times and not _without(atoms, product) and all(map(plain, _rest(atoms, product)))
        for atoms, n in a.terms.items()
    )


def _without(atoms: tuple[str, ...], wanted: tuple[str, ...]) -> list[str]:
    """Those of `wanted` that `atoms` lacks."""
    return _rest(wanted, atoms)


def _rest(atoms: tuple[str, ...], taken: tuple[str, ...]) -> list[str]:
    left = list(atoms)
    for atom in taken:
        if atom in left:
            left.remove(atom)
    return left


_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: lambda a, b: a // np.where(np.equal(b, 0), 1, b),
    ast.Mod: lambda a, b: a % np.where(np.equal(b, 0), 1, b),
    ast.BitAnd: lambda a, b: np.logical_and(a, b).astype(np.int64),
    ast.BitOr: lambda a, b: np.logical_or(a, b).astype(np.int64),
    ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
    ast.Lt: np.less,
    ast.LtE: np.less_equal,
    ast.Gt: np.greater,
    ast.GtE: np.greater_equal,
}


def evaluate(text: str, names: Environment) -> int:
    """The count's value. `names`: an integer or an integer tensor for each free name.

    Raises KeyError for a name that is not given.
    """
    lanes = {name: np.asarray(value) for name, value in names.items() if isinstance(value, int)}
    tensors = {name: np.asarray(v) for name, v in names.items() if not isinstance(v, int)}
    return int(np.sum(_Evaluation(tensors).value(_parsed(text), lanes, 1)))


@lru_cache(maxsize=1024)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


class _Evaluation:
    """All iterations of the loops around a node at once: its value is an array, or one number.

    Both sides of a `where` are computed, so indices are clipped to the tensor.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = tensors

    def value(self, node: ast.expr, names: Mapping[str, NDArray[Any]], lanes: int) -> Any:
        if isinstance(node, ast.Constant):
            return np.asarray(node.value)
        if isinstance(node, ast.Name):
            return names[node.id]
        if isinstance(node, ast.UnaryOp):
            return -self.value(node.operand, names, lanes)
        if isinstance(node, ast.BinOp):
            a, b = (self.value(side, names, lanes) for side in (node.left, node.right))
            return _OPERATORS[type(node.op)](a, b)
        if isinstance(node, ast.Compare):
            a, b = (self.value(side, names, lanes) for side in (node.left, node.comparators[0]))
            return _OPERATORS[type(node.ops[0])](a, b).astype(np.int64)
        if isinstance(node, ast.Subscript):
            return self._element(node, names, lanes)
        assert isinstance(node, ast.Call)
        assert isinstance(node.func, ast.Name)
        if node.func.id == "sum":
            return self._sum(node, names, lanes)
        values = [self.value(argument, names, lanes) for argument in node.args]
        functions: dict[str, Callable[..., Any]] = {
            "min": np.minimum, "max": np.maximum, "where": np.where,
        }  # fmt: skip
        return functions[node.func.id](*values)

    def _element(self, node: ast.Subscript, names: Mapping[str, NDArray[Any]], lanes: int) -> Any:
        assert isinstance(node.value, ast.Name)
        tensor = self._tensors[node.value.id]
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        indices = [self.value(part, names, lanes) for part in parts]
        clipped = [np.clip(i, 0, n - 1) for i, n in zip(indices, tensor.shape, strict=True)]
        return tensor[tuple(clipped)].astype(np.int64)

    def _sum(self, node: ast.Call, names: Mapping[str, NDArray[Any]], lanes: int) -> Any:
        variable, extent, body = node.args
        assert isinstance(variable, ast.Name)
        counts = np.maximum(self.value(extent, names, lanes), 0)
        counts = np.broadcast_to(counts, (lanes,)).astype(np.int64)
        outer = np.repeat(np.arange(lanes), counts)  # each inner iteration's outer one
        first = np.cumsum(counts) - counts
        inner = {name: v[outer] if v.ndim else v for name, v in names.items()}
        inner[variable.id] = np.arange(len(outer)) - first[outer]
        values = np.broadcast_to(self.value(body, inner, len(outer)), (len(outer),))
        return np.bincount(outer, weights=values, minlength=lanes).astype(np.int64)
