"""Times every call of a kernel that a library's virtual machine makes.

The VM tells its instrument what it calls, but not what its builtins call: the kernels of TVM's KV
cache are seen by handing the cache others around them. Knows no profile and no FLOP.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tvm
from numpy.typing import NDArray

CREATE_CACHE = "vm.builtin.paged_attention_kv_cache_create"
MAX_ELEMENTS = 1 << 16  # of an integer tensor whose values are kept

# A tensor's shape, with its values if it holds integers, and not too many of them; or a number.
Argument: TypeAlias = "tuple[tuple[int, ...], NDArray[Any] | None] | int | float | None"


@dataclass(frozen=True)
class Call:
    """One call of a kernel. `arguments`: if they are recorded."""

    kernel: str
    seconds: float
    arguments: tuple[Argument, ...] | None


class Instrument:
    """Collects the calls of these kernels while it is on; `take` gives and forgets them.

    record: keep the arguments too, which takes time of its own, outside of the calls.
    """

    def __init__(self, kernels: Iterable[str], device: tvm.runtime.Device) -> None:
        self.is_on = self.record = False
        self._kernels = frozenset(kernels)
        is_cpu = device.dlpack_device_type() == tvm.cpu().dlpack_device_type()
        self._wait: Callable[[], object] | None = None if is_cpu else device.sync
        self._calls: list[Call] = []
        self._arguments: tuple[Argument, ...] | None = None
        self._start = 0.0

    def take(self) -> list[Call]:
        calls, self._calls = self._calls, []
        return calls

    def __call__(
        self,
        function: Any,  # noqa: ARG002
        name: str,
        before: bool,
        result: Any,  # noqa: ARG002
        *arguments: Any,
    ) -> int:
        """What the VM calls before and after each call."""
        if name not in self._kernels or not self.is_on:
            return 0
        if self._wait is not None:
            self._wait()
        if before:
            self._arguments = tuple(map(_keep, arguments)) if self.record else None
            self._start = time.perf_counter()
        else:
            seconds = time.perf_counter() - self._start
            self._calls.append(Call(name, seconds, self._arguments))
        return 0

    @contextmanager
    def on_cache_kernels(self, library: Path) -> Iterator[None]:
        """TVM's KV caches that the library makes herein call its kernels through this."""
        names = cache_kernels(str(tvm.runtime.load_module(str(library))["as_text"]()))
        original = tvm.get_global_func(CREATE_CACHE)

        def create(*arguments: Any) -> Any:
            return original(*map(self._around, arguments, names))

        tvm.register_global_func(CREATE_CACHE, create, override=True)
        try:
            yield
        finally:
            tvm.register_global_func(CREATE_CACHE, original, override=True)

    def _around(self, argument: Any, names: Sequence[str]) -> Any:
        """A function, or an array with functions in it, of these names."""
        if callable(argument):
            return self._wrap(argument, names[0])
        if isinstance(argument, tvm.ir.Array):
            left = iter(names)
            return [self._wrap(item, next(left)) if callable(item) else item for item in argument]
        return argument

    def _wrap(self, kernel: Any, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self(kernel, name, True, None, *arguments)
            result = kernel(*arguments)
            self(kernel, name, False, result, *arguments)
            return result

        return call


def cache_kernels(code: str) -> list[list[str]]:
    """The names of the functions in each argument that TVM's KV cache is made with.

    `code`: the library's VM code as TVM prints it. Empty if it makes no such cache.
    """
    names: dict[str, list[str]] = {}  # of the functions in a tuple, by the register it is in
    for line in code.splitlines():
        found = re.match(r"\s*call\s+(\S+)\s+in: (.*?)\s*dst: (\S+)", line)
        if found is None:
            continue
        callee, arguments, register = found.groups()
        of_each = [
            re.findall(r"^f\[(.+)\]$", argument) or names.get(argument, [])
            for argument in arguments.split(", ")
        ]
        if callee == CREATE_CACHE:
            return of_each
        names[register] = [*chain(*of_each)] if callee.endswith("make_tuple") else []
    return []


def _keep(argument: Any) -> Argument:
    if isinstance(argument, tvm.runtime.Tensor):
        shape = tuple(map(int, argument.shape))
        is_small_int = "int" in str(argument.dtype) and np.prod(shape) <= MAX_ELEMENTS
        return shape, argument.numpy() if is_small_int else None
    return argument if isinstance(argument, int | float) else None
