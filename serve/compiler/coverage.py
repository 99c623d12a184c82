"""Apply schedule rules one by one and say which rule took which kernel.

DLight itself says nothing.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

from profiles import RuleUse
from serve.compiler.work import count_work
from serve.errors import CompileError

KV_CACHE = "create_paged_kv_cache"  # the function that hands TVM's cache its kernels


@dataclass(frozen=True)
class KernelCoverage:
    """One kernel: the rule that took it, or None.

    `as_written` if its author had scheduled it by hand.

    `called_by` are the library's functions that call it. `declined` says why the rules before the
    one that took it did not, by rule id, as far as they say.

    `work`: what it computes and moves, as in serve/compiler/work.py.
    """

    kernel: str
    rule: str | None
    as_written: bool
    called_by: tuple[str, ...]
    declined: Mapping[str, str] = field(default_factory=dict)
    work: Mapping[str, Any] = field(default_factory=dict)

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
    work = {name: count_work(name, func) for name, func in _kernels(mod)}
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
            called_by = tuple(sorted(callers[name]))
            declined = _reasons(func, offered, rule, target)
            coverage.append(KernelCoverage(name, rule, as_written, called_by, declined, work[name]))
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


def _reasons(
    func: tirx.PrimFunc,
    rules: Sequence[tuple[str, Any]],
    taker: str | None,
    target: tvm.target.Target,
) -> dict[str, str]:
    """Why the rules before the taker declined: ours say so in `why_not`, TVM's do not."""
    before = itertools.takewhile(lambda offered: offered[0] != taker, rules)
    return {i: rule.why_not(func, target) for i, rule in before if hasattr(rule, "why_not")}


def panel_of(rules: Sequence[RuleUse], target: tvm.target.Target) -> int | None:
    """How many rows wide the panels of packed weights are to be; None: not packed.

    Raises CompileError if the rules want different ones.
    """
    built = {use.rule.id: _build(use) for use in rules}
    wanted = {i: rule.panel(target) for i, rule in built.items() if hasattr(rule, "panel")}
    if len(set(wanted.values())) > 1:
        raise CompileError(f"the rules want weights packed in panels of different widths: {wanted}")
    return next(iter(wanted.values()), None)


def _kernels(mod: tvm.IRModule) -> list[tuple[str, tirx.PrimFunc]]:
    functions = [(variable.name_hint, func) for variable, func in mod.functions_items()]
    return [(name, func) for name, func in functions if isinstance(func, tirx.PrimFunc)]


def _callers(mod: tvm.IRModule) -> dict[str, set[str]]:
    callers: dict[str, set[str]] = defaultdict(set)
    for caller, func in mod.functions_items():
        if isinstance(func, relax.Function):

            def visit(expr: Any, caller: str = caller.name_hint) -> None:
                if isinstance(expr, tvm.ir.GlobalVar):
                    callers[expr.name_hint].add(caller)

            relax.analysis.post_order_visit(func, visit)
    return callers
