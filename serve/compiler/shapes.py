"""The functions that compute a step's shapes: in one order, and each once. Imports TVM.

TVM's VMShapeLower writes a function's extents in the order of a hash over addresses, and merges two
functions only where those came out the same: without this, each process that compiles a library
would get another digest.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar
from tvm.relax.expr_functor import PyExprMutator, mutator


@tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
def settle_shapes(mod: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """To be run right after VMShapeLower."""
    functions: Any = mod.functions_items()
    found = [(var, func) for var, func in functions if _stores(func)]
    found.sort(key=lambda item: (len(item[0].name_hint), item[0].name_hint))  # as they were made
    rest = {var: func for var, func in functions if not _stores(func)}
    settled = _Settled(tvm.IRModule(rest, mod.attrs, mod.global_infos))
    for var, func in found:
        settled.add(var, func)
    for var, func in rest.items():
        if isinstance(func, relax.Function):
            settled.builder_.update_func(var, settled.visit_expr(func))
    return settled.builder_.get()


def _stores(func: Any) -> list[tirx.BufferStore]:
    """What a function of VMShapeLower does; nothing for any other."""
    if not isinstance(func, tirx.PrimFunc) or not func.attrs.get("tirx.is_host_func", False):
        return []
    stores = list(func.body.seq) if isinstance(func.body, tirx.SeqStmt) else [func.body]
    return stores if all(isinstance(store, tirx.BufferStore) for store in stores) else []


@mutator
class _Settled(PyExprMutator):  # type: ignore[misc]
    """The module with the functions that were added, and the calls of those that they replace."""

    def __init__(self, mod: tvm.IRModule) -> None:
        super().__init__(mod)
        self._new: dict[str, GlobalVar] = {}  # by the old one's name

    def add(self, old: GlobalVar, func: tirx.PrimFunc) -> None:
        """By where it stores: it reads what was there before, never what it has stored."""
        stores = sorted(_stores(func), key=lambda store: int(store.indices[0]))
        body = tirx.SeqStmt(stores) if len(stores) > 1 else stores[0]
        # The builder gives the same variable for the same function.
        self._new[old.name_hint] = self.builder_.add_func(func.with_body(body), "extents")

    def visit_global_var_(self, var: GlobalVar) -> GlobalVar:
        return self._new.get(var.name_hint, var)
