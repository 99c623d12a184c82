"""Kernels compiled under our CPU rules, to be run over numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, te, tirx
from tvm.relax.frontend import nn

from profiles import RuleUse, known_rules
from serve.compiler.coverage import panel_of, schedule
from serve.compiler.pipeline import fuse, lower
from tests.compiler.conftest import target_for

Array = NDArray[Any]
Function = Callable[..., Any]
Shape = tuple[Any, ...]  # numbers, and the names of those that are known at run time only
PRODUCT_RULES = ("cpu.matmul", "cpu.gemv")


class Of(NamedTuple):
    """An input of another type than the others."""

    shape: Shape
    dtype: str


Inputs = Sequence[Shape | Of]


def uses(rule_ids: Sequence[str] = PRODUCT_RULES, **values: Any) -> list[RuleUse]:
    """The rules with these parameters, as far as each of them has them."""
    rules = [known_rules()[rule_id] for rule_id in rule_ids]
    return [
        RuleUse(rule, {p.name: values.get(p.name, p.default) for p in rule.parameters})
        for rule in rules
    ]


def panel(cpu: str = "here", **values: Any) -> int:
    """The width of packed weights' panels."""
    found = panel_of(uses(**values), target_for(cpu))
    assert found is not None
    return found


def packed(weight: Array, panel: int) -> Array:
    """As serve.model.layers.pack does it: [ceil(out / panel), in, panel], zeros at the end."""
    rows, columns = weight.shape
    filled = np.zeros((-(-rows // panel) * panel, columns), weight.dtype)
    filled[:rows] = weight
    return np.ascontiguousarray(filled.reshape(-1, panel, columns).swapaxes(1, 2))


@tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
def no_passes(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    return mod


class Kernels:
    """Functions of Relax compiled under these rules: name -> what it does, and its inputs."""

    def __init__(
        self,
        functions: Mapping[str, tuple[Function, Inputs]],
        rule_ids: Sequence[str] = PRODUCT_RULES,
        dtype: str = "float32",
        cpu: str = "here",
        **values: Any,
    ) -> None:
        spec: dict[str, Any] = {}
        module = nn.Module()
        for name, (function, inputs) in functions.items():
            setattr(module, name, function)
            typed = [each if isinstance(each, Of) else Of(each, dtype) for each in inputs]
            tensors = {
                f"x{i}": nn.spec.Tensor(list(each.shape), each.dtype)
                for i, each in enumerate(typed)
            }
            spec[name] = tensors | {"$": {"param_mode": "none", "effect_mode": "none"}}
        target = target_for(cpu)
        with target:
            mod = fuse(module.export_tvm(spec=spec)[0])
            mod, coverage = schedule(mod, uses(rule_ids, **values), target)
            executable = tvm.compile(lower(mod), target=target, relax_pipeline=no_passes)
        self.rules = {
            name: [entry.rule for entry in coverage if name in entry.called_by]
            for name in functions
        }
        self._vm = relax.VirtualMachine(executable, tvm.cpu())

    def __call__(self, name: str, *inputs: Array) -> Array:
        tensors = [tvm.runtime.tensor(np.asarray(array, order="C")) for array in inputs]
        result: Array = self._vm[name](*tensors).numpy()
        return result


class Loops:
    """Loop nests of TE, offered to one rule: inputs first, outputs last."""

    def __init__(self, rule: Any, *tensors: te.Tensor, cpu: str = "here") -> None:
        self.rule, self.target = rule, target_for(cpu)
        names = {"global_symbol": "main", "tirx.noalias": True}
        self.func: tirx.PrimFunc = te.create_prim_func(list(tensors)).with_attrs(names)

    @property
    def declined(self) -> str | None:
        """Why the rule does not take them; it then really does not."""
        reason: str | None = self.rule.why_not(self.func, self.target)
        assert (reason is None) == (self.scheduled() is not None)
        return reason

    def run(self, *inputs: Array, out: tuple[Shape, str]) -> Array:
        """The output, of this shape and type, as the rule's schedule computes it."""
        scheduled = self.scheduled()
        assert scheduled is not None, self.declined
        library = tvm.compile(scheduled.mod, target=self.target)
        shape, dtype = out
        result = tvm.runtime.tensor(np.full(shape, 77).astype(dtype))  # all of it is to be written
        library["main"](*(tvm.runtime.tensor(np.asarray(x, order="C")) for x in inputs), result)
        array: Array = result.numpy()
        return array

    def scheduled(self) -> Any:
        """The rule's schedule, or None."""
        with self.target:
            return self.rule.apply(self.func, self.target, False)


def random(*shapes: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> list[Array]:
    """Numbers between -1 and 1."""
    rng = np.random.default_rng(seed)
    return [(rng.random(shape, np.float32) * 2 - 1).astype(dtype) for shape in shapes]
