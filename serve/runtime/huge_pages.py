"""Memory for large tensors in pages of 2 MiB, where the system has them.

A decode step reads every weight once. In pages of 4 KiB that is a hundred thousand addresses to
look up, and the processor waits for them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PAGE = 2 << 20
CHUNK = 32 * PAGE  # at a time; what is not used of it is no memory
ALIGNMENT = 64  # what TVM's kernels expect


class HugePages:
    """Hands out arrays, float32 and zero; each keeps its memory as long as it lives."""

    def __init__(self) -> None:
        self._room: NDArray[np.uint8] = np.empty(0, np.uint8)

    def array(self, shape: Sequence[int]) -> NDArray[np.float32]:
        size = math.prod(shape) * np.dtype(np.float32).itemsize
        whole = -(-size // ALIGNMENT) * ALIGNMENT
        if whole > len(self._room):
            self._room = _mapped(max(whole, CHUNK))
        taken, self._room = self._room[:size], self._room[whole:]
        return taken.view(np.float32).reshape(shape)


def _mapped(size: int) -> NDArray[np.uint8]:
    """So many bytes from a page's beginning on. On systems without huge pages, ordinary ones."""
    memory = mmap.mmap(-1, size + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % PAGE
    return whole[first : first + size]
