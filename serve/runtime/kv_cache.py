"""A library's KV cache behind one small interface: TVM's paged cache, or KV pages of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.runtime import ShapeTuple

from serve.compiler.library import Manifest
from serve.runtime.huge_pages import HugePages
from serve.runtime.pages import Pages, Tables

_ALIGNMENT = 16  # int32 in the 64 bytes to which TVM's kernels expect tensors to be aligned


class KVCache(Protocol):
    """Sequences and their pages, as in serve.engine's ModelRunner."""

    @property
    def num_free(self) -> int:
        """Pages."""

    def add(self, seq_id: int) -> None: ...

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None: ...

    def rollback(self, seq_id: int, num_tokens: int) -> None: ...

    def release(self, seq_id: int) -> None: ...

    def begin(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> Any:
        """Append so many tokens to each sequence; what the step's function takes as `kv_cache`."""

    def end(self) -> None:
        """The step's function has returned."""


def make_kv_cache(
    manifest: Manifest, vm: Any, max_batch: int, kv_tokens: int, max_step_tokens: int
) -> KVCache:
    """Of the kind that the library was compiled for, and of as many pages as `kv_tokens` fill."""
    if manifest.kv_cache == "pages":
        return OwnPages(vm, -(-kv_tokens // manifest.page_size), manifest.page_size)
    return TVMCache(vm, max_batch, kv_tokens, max_step_tokens, manifest.page_size)


class OwnPages(Pages):
    """The tensors of serve/model/kv_pages.py, in the host's memory."""

    def __init__(self, vm: Any, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, page_size)
        pages = HugePages()
        shapes = [tensor.shape for tensor in vm["create_kv_pages"](ShapeTuple([num_pages]))]
        self._contents = [pages.array(shape) for shape in shapes]
        self._tensors = [tvm.runtime.from_dlpack(content) for content in self._contents]
        self._room = _aligned(1024)  # for the tables of a step

    def copy(self, source: int, target: int) -> None:
        for content in self._contents:
            content[:, target] = content[:, source]

    def begin(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> Any:
        return [*self._tensors, *self._as_tensors(self.append(seq_ids, lengths))]

    def end(self) -> None:
        pass

    def _as_tensors(self, tables: Tables) -> list[Any]:
        """Valid until the next step: views of one memory, which cost less than new tensors."""
        sizes = [-(-len(table) // _ALIGNMENT) * _ALIGNMENT for table in tables]
        if sum(sizes) > len(self._room):
            self._room = _aligned(2 * sum(sizes))
        tensors, begin = [], 0
        for table, size in zip(tables, sizes, strict=True):
            view = self._room[begin : begin + len(table)]
            view[:] = table
            tensors.append(tvm.runtime.from_dlpack(view))
            begin += size
        return tensors


def _aligned(size: int) -> NDArray[np.int32]:
    """Memory of TVM's, so aligned."""
    memory: Any = np.from_dlpack(tvm.runtime.empty((size,), "int32"))
    return cast(NDArray[np.int32], memory)


class TVMCache:
    """An object of TVM's, and the VM's builtins on it."""

    def __init__(
        self, vm: Any, max_batch: int, kv_tokens: int, max_step_tokens: int, page_size: int
    ) -> None:
        sizes = (max_batch, kv_tokens, max_step_tokens, page_size, 0)  # no sliding window
        self._cache = vm["create_paged_kv_cache"](*(ShapeTuple([size]) for size in sizes))
        get = tvm.get_global_func
        self._add = get("vm.builtin.kv_state_add_sequence")
        self._fork = get("vm.builtin.kv_state_fork_sequence")
        self._remove = get("vm.builtin.kv_state_remove_sequence")
        self._popn = get("vm.builtin.kv_state_popn")
        self._begin = get("vm.builtin.kv_state_begin_forward")
        self._end = get("vm.builtin.kv_state_end_forward")
        self._available = get("vm.builtin.attention_kv_cache_get_num_available_pages")

    @property
    def num_free(self) -> int:
        return int(self._available(self._cache))

    def add(self, seq_id: int) -> None:
        self._add(self._cache, seq_id)

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        self._fork(self._cache, parent_id, child_id, num_tokens)

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        self._popn(self._cache, seq_id, num_tokens)

    def release(self, seq_id: int) -> None:
        self._remove(self._cache, seq_id)

    def begin(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> Any:
        self._begin(self._cache, ShapeTuple(list(seq_ids)), ShapeTuple(list(lengths)))
        return self._cache

    def end(self) -> None:
        self._end(self._cache)
