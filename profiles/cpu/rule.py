"""What our CPU rules have in common: they say why they decline, and write the loops themselves.

Imports TVM.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from tvm import s_tir, tirx
from tvm.s_tir.dlight.base import ScheduleRule
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target


class Declined(Exception):  # noqa: N818  (an answer, not an error)
    """A rule does not take a function; the message says why."""


class CPURule(ScheduleRule):  # type: ignore[misc]
    """A DLight rule for LLVM targets."""

    @abstractmethod
    def schedule(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule:
        """The scheduled function. Raises Declined."""

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        try:
            return self._schedule(func, target)
        except Declined:
            return None

    def why_not(self, func: tirx.PrimFunc, target: Target) -> str | None:
        """Why this rule declines the function; None if it takes it."""
        try:
            self._schedule(func, target)
        except Declined as reason:
            return str(reason)
        return None

    def _schedule(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule:
        if target.kind.name != "llvm":
            raise Declined(f"it schedules for llvm, not for {target.kind.name}")
        if not isinstance(func, tirx.PrimFunc):
            raise Declined("it is not a TIR function")
        return self.schedule(func, target)


def with_body(func: tirx.PrimFunc, emit: Callable[[], None]) -> s_tir.Schedule:
    """The function with the loop nest that `emit` writes through TVM's IRBuilder as its body."""
    with IRBuilder() as builder:
        emit()
    root = s_tir.SBlock([], [], [], "root", builder.get())
    body = s_tir.SBlockRealize([], tirx.const(True, "bool"), root)
    return s_tir.Schedule(tirx.PrimFunc(func.params, body, func.ret_type, func.attrs))
