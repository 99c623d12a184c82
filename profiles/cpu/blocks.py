"""A TIR function as a list of blocks, its elementwise chains inlined. Imports TVM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline_contiguous_spatial

from profiles.cpu.rule import Declined


@dataclass(frozen=True)
class Block:
    """One statement in a loop nest: `store` over `iters`, from `init` if it is a reduction."""

    iters: tuple[tirx.IterVar, ...]
    store: tirx.BufferStore
    init: Any

    @property
    def kinds(self) -> str:
        """S for each spatial iterator and R for each of a reduction, in order."""
        names = {tirx.IterVar.DataPar: "S", tirx.IterVar.CommReduce: "R"}
        return "".join(names.get(i.iter_type, "?") for i in self.iters)

    @property
    def vars(self) -> list[tirx.Var]:
        return [i.var for i in self.iters]

    @property
    def extents(self) -> list[Any]:
        """An int where it is known when compiling, else an expression."""
        return [known(i.dom.extent) for i in self.iters]

    @property
    def stores_at_iters(self) -> bool:
        """Whether it stores at its spatial iterators, each once and in order, and zeros."""
        spatial = [i.var for i, kind in zip(self.iters, self.kinds, strict=True) if kind == "S"]
        return are(self.store.indices, spatial)

    @property
    def start(self) -> Any:
        """What a reduction begins at; None if that is no constant."""
        return getattr(getattr(self.init, "value", None), "value", None)

    @property
    def accumulates(self) -> bool:
        """Whether the first operand of what it stores is what was stored there before."""
        so_far = self.store.value.a
        return (
            isinstance(so_far, TensorLoad)
            and so_far.source.same_as(self.store.buffer)
            and all(map(tvm_ffi.structural_equal, so_far.indices, self.store.indices))
        )


def are(indices: Sequence[Any], variables: Sequence[tirx.Var]) -> bool:
    """Whether the indices, those of unit axes left out, are these variables in order."""
    found = [index for index in indices if not (isinstance(known(index), int) and index == 0)]
    return len(found) == len(variables) and all(
        a.same_as(b) for a, b in zip(found, variables, strict=True)
    )


def blocks_of(func: tirx.PrimFunc) -> tuple[list[Block], tirx.PrimFunc]:
    """The blocks in order, and the function they are in: inlining may make it another.

    Raises Declined if it is not a plain sequence of blocks with loops of their own, of which the
    last alone writes an output.
    """
    sch = s_tir.Schedule(func)
    infos = normalize_prim_func(sch)
    if infos is not None:
        infos = try_inline_contiguous_spatial(sch, infos)
    if not infos:
        raise Declined("it is not a sequence of loop nests, one block in each")
    func = sch.mod["main"]
    blocks = [_block(sch.get(info.block_rv)) for info in infos]
    check_fusable(func, [block.store.buffer for block in blocks[:-1]])
    return blocks, func


def check_fusable(func: tirx.PrimFunc, between: Sequence[tirx.Var]) -> None:
    """That its blocks may become one loop nest, without these buffers. Raises Declined."""
    if any(buffer.same_as(param) for buffer in between for param in func.params):
        raise Declined("it has more than one output")
    predicates: list[Any] = []
    visitor = (s_tir.SBlockRealize, lambda realize: predicates.append(realize.predicate))
    tvm_ffi.structural_walk(func.body, visitor)
    if any(known(predicate) != 1 for predicate in predicates):
        raise Declined("a loop nest leaves out elements, by a predicate")


def _block(block: s_tir.SBlock) -> Block:
    if not isinstance(block.body, tirx.BufferStore):
        raise Declined(f"block {block.name_hint!r} is more than one store")
    return Block(tuple(block.iter_vars), block.body, block.init)


def known(extent: Any) -> Any:
    return int(extent) if isinstance(extent, int | tirx.IntImm) else extent


def rewrite(
    value: Any, variables: Mapping[tirx.Var, Any], load: Callable[[TensorLoad], Any] = lambda x: x
) -> Any:
    """`value` with variables replaced, and then each load of a buffer by what `load` gives."""
    pairs = list(variables.items())

    def replace(var: tirx.Var) -> Any:
        return next((new for old, new in pairs if var.same_as(old)), var)

    return tvm_ffi.structural_map(value, [(TensorLoad, load), (tirx.Var, replace)])


def loads_of(value: Any, buffer: tirx.Var) -> list[TensorLoad]:
    """Where an expression reads the buffer."""
    found: list[TensorLoad] = []

    def visit(load: TensorLoad) -> None:
        if load.source.same_as(buffer):
            found.append(load)

    tvm_ffi.structural_walk(value, (TensorLoad, visit))
    return found
