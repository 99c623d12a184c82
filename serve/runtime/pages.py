"""Which pages each sequence has, and the tables of a step. Knows nothing of what is in a page.

A page that several sequences have is full for each of them, so nobody writes into it: forking in
the middle of a page copies it, and so does a rollback into one that is shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Tables(NamedTuple):
    """Where a step's tokens are, as serve/model/kv_pages.py takes it; all int32."""

    positions: NDArray[np.int32]  # (tokens,)
    starts: NDArray[np.int32]  # (tokens,)
    numbers: NDArray[np.int32]  # (entries,)


@dataclass
class _Sequence:
    length: int = 0  # tokens
    pages: array[int] = field(default_factory=lambda: array("i"))


class Pages(ABC):
    """`num_pages` pages of `page_size` tokens.

    Every method raises ValueError for a sequence that is unknown, or known where it should be new,
    and for a number of tokens that cannot be, and RuntimeError where the free pages do not suffice.
    Nothing has changed then.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._sequences: dict[int, _Sequence] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages  # sequences that have the page

    @property
    def num_free(self) -> int:
        return len(self._free)

    def add(self, seq_id: int) -> None:
        self._check_new(seq_id)
        self._sequences[seq_id] = _Sequence()

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Begin a sequence with the first `num_tokens` of another."""
        parent = self._known(parent_id)
        self._check_new(child_id)
        self._check_tokens(parent_id, num_tokens, parent.length)
        num_whole, in_part = divmod(num_tokens, self._page_size)
        self._check_free(1 if in_part else 0)
        child = _Sequence(num_tokens, parent.pages[:num_whole])
        for page in child.pages:
            self._holders[page] += 1
        if in_part:
            child.pages.append(self._copied(parent.pages[num_whole]))
        self._sequences[child_id] = child

    def append(self, seq_ids: Sequence[int], lengths: Sequence[int]) -> Tables:
        """Make room for so many more tokens in each sequence; where they are."""
        sequences = [self._known(seq_id) for seq_id in seq_ids]
        if min(lengths, default=0) < 1 or len(set(seq_ids)) < len(seq_ids):
            raise ValueError(f"a step of sequences {list(seq_ids)}, {list(lengths)} tokens of each")
        totals = [s.length + n for s, n in zip(sequences, lengths, strict=True)]
        needed = [self._pages_for(n) - len(s.pages) for s, n in zip(sequences, totals, strict=True)]
        self._check_free(sum(needed))
        numbers, begins, offsets = array("i"), [], []
        for sequence, total, count in zip(sequences, totals, needed, strict=True):
            sequence.pages.extend(self._take() for _ in range(count))
            begins.append(sequence.length)
            offsets.append(len(numbers))
            numbers.extend(sequence.pages)
            sequence.length = total
        return _tables(begins, lengths, offsets, numbers)

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        """Forget a sequence's last tokens."""
        sequence = self._known(seq_id)
        self._check_tokens(seq_id, num_tokens, sequence.length)
        length = sequence.length - num_tokens
        num_pages = self._pages_for(length)
        is_shared = length % self._page_size and self._holders[sequence.pages[num_pages - 1]] > 1
        self._check_free(1 if is_shared else 0)
        if is_shared:
            shared = sequence.pages[num_pages - 1]
            sequence.pages[num_pages - 1] = self._copied(shared)
            self._drop(shared)
        for page in sequence.pages[num_pages:]:
            self._drop(page)
        del sequence.pages[num_pages:]
        sequence.length = length

    def release(self, seq_id: int) -> None:
        """Forget a sequence."""
        for page in self._known(seq_id).pages:
            self._drop(page)
        del self._sequences[seq_id]

    @abstractmethod
    def copy(self, source: int, target: int) -> None:
        """Copy what is in a page."""

    def _known(self, seq_id: int) -> _Sequence:
        if seq_id not in self._sequences:
            raise ValueError(f"there is no sequence {seq_id}")
        return self._sequences[seq_id]

    def _check_new(self, seq_id: int) -> None:
        if seq_id in self._sequences:
            raise ValueError(f"there is a sequence {seq_id} already")

    def _check_tokens(self, seq_id: int, num_tokens: int, length: int) -> None:
        if not 0 <= num_tokens <= length:
            raise ValueError(f"{num_tokens} tokens of sequence {seq_id}, which has {length}")

    def _check_free(self, num_pages: int) -> None:
        if num_pages > len(self._free):
            raise RuntimeError(f"{num_pages} more KV pages needed, {len(self._free)} are free")

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _copied(self, page: int) -> int:
        target = self._take()
        self.copy(page, target)
        return target

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)


def _tables(
    begins: Sequence[int], lengths: Sequence[int], offsets: Sequence[int], numbers: array[int]
) -> Tables:
    """`begins`: each sequence's first new position. `offsets`: where its pages are in `numbers`."""
    counts = np.asarray(lengths, np.int32)
    first_rows = np.cumsum(counts, dtype=np.int32) - counts
    shifts = np.asarray(begins, np.int32) - first_rows
    rows = np.arange(counts.sum(), dtype=np.int32)
    positions = rows + np.repeat(shifts, counts)
    starts = np.repeat(np.asarray(offsets, np.int32), counts)
    return Tables(positions, starts, np.frombuffer(numbers, np.int32))
