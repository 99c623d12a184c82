"""Memory for large tensors: aligned, zero, apart from each other, alive as long as its arrays."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import numpy as np
import pytest

from serve.runtime.huge_pages import ALIGNMENT, CHUNK, PAGE, HugePages

pytestmark = pytest.mark.compiler


@pytest.mark.parametrize("shape", [(1,), (3, 5), (1000, 7, 16), (CHUNK // 4 + 1,)])
def test_zero_and_aligned(shape: tuple[int, ...]) -> None:
    pages = HugePages()
    for array in (pages.array(shape), pages.array(shape)):
        assert array.shape == shape
        assert array.dtype == np.float32
        assert array.ctypes.data % ALIGNMENT == 0
        assert not array.any()
        array[...] = 1


def test_arrays_are_apart_and_outlive_their_maker() -> None:
    pages = HugePages()
    arrays = [pages.array((n, 1001)) for n in (1, 2, 3000, 7, 9000, 5)]
    for number, array in enumerate(arrays):
        array[...] = number
    del pages
    gc.collect()
    for number, array in enumerate(arrays):
        assert (array == number).all()


def test_the_first_of_a_chunk_begins_a_page() -> None:
    assert HugePages().array((CHUNK,)).ctypes.data % PAGE == 0


def test_the_system_is_asked_for_huge_pages() -> None:
    """And gives them, where it does on demand: it may lack free ones, so not all of them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not hasattr(mmap, "MADV_HUGEPAGE") or not setting.exists():
        pytest.skip("this system has no transparent huge pages")
    if "[never]" in setting.read_text():
        pytest.skip("this system is set to give none")
    array = HugePages().array((16 * PAGE,))
    array[...] = 1
    address = array.ctypes.data
    flags = _flags_at(address)
    assert "hg" in flags


def _flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping at the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        begin, dash, rest = line.partition("-")
        if dash and len(rest.split()) >= 4 and ":" not in begin:
            inside = int(begin, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
