"""Apply schedule rules one by one and say which rule took which kernel.

DLight itself says nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from profiles import RuleUse
from serve.errors import CompileError

KV_CACHE = "create_paged_kv_cache"  # the function that hands TVM's cache its kernels


@dataclass(frozen=True)
class KernelCoverage:
    """One kernel: the rule that took it, or None.

    `as_written` if its author had scheduled it by hand.

    `called_by` are the library's functions that call it.
    """

    kernel: str
    rule: str | None
    as_written: bool
    called_by: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def schedule(
    mod: tvm.IRModule, rules: Sequence[RuleUse], target: tvm.target.Target
) -> tuple[tvm.IRModule, list[KernelCoverage]]:
    """Offer every kernel to the rules in order; the first that takes it wins.

    Returns the scheduled module and the coverage, by kernel name. Raises CompileError naming the
    rule if it cannot be made, and the kernel too if it fails rather than declines.
    """
    built = [(use.rule.id, _build(use)) for use in rules]
    callers = _callers(mod)
    coverage = []
    with target:
        for variable, func in mod.functions_items():
            if not isinstance(func, tirx.PrimFunc):
                continue
            name = variable.name_hint
            as_written = bool(func.attrs and func.attrs.get("tirx.is_scheduled", False))
            offered = [(i, r) for i, r in built if not as_written or _takes_scheduled(r)]
            rule, scheduled = _first_taker(name, func, offered, target)
            if scheduled is not None:
                mod[variable] = scheduled.with_attr("tirx.is_scheduled", True)
            as_written = as_written and rule is None
            coverage.append(KernelCoverage(name, rule, as_written, tuple(sorted(callers[name]))))
    return mod, sorted(coverage, key=lambda entry: entry.kernel)


def _build(use: RuleUse) -> Any:
    try:
        return use.build()
    except Exception as error:
        raise CompileError(f"rule {use.rule.id} ({use.rule.path}) is broken: {error}") from error


def _takes_scheduled(rule: Any) -> bool:
    """Whether the rule replaces kernels that their author has marked as scheduled."""
    return getattr(rule, "takes_scheduled", False) is True


def _first_taker(
    name: str, func: tirx.PrimFunc, rules: Sequence[tuple[str, Any]], target: tvm.target.Target
) -> tuple[str | None, tirx.PrimFunc | None]:
    for rule_id, rule in rules:
        try:
            space = rule.apply(func, target, False)
        except Exception as error:
            raise CompileError(f"rule {rule_id} failed on kernel {name}: {error}") from error
        if space is not None:
            schedule_ = space if isinstance(space, s_tir.Schedule) else space[0]
            return rule_id, schedule_.mod["main"]
    return None, None


def _callers(mod: tvm.IRModule) -> dict[str, set[str]]:
    callers: dict[str, set[str]] = defaultdict(set)
    for caller, func in mod.functions_items():
        if isinstance(func, relax.Function):

            def visit(expr: Any, caller: str = caller.name_hint) -> None:
                if isinstance(expr, tvm.ir.GlobalVar):
                    callers[expr.name_hint].add(caller)

            relax.analysis.post_order_visit(func, visit)
    return callers
