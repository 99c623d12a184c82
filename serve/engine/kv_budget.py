"""The engine's accounting of KV pages.

Mirrors TVM's paged cache page for page, which a test holds.

Who holds a page: every sequence whose tokens it stores. A live sequence (one that a client waits
for) makes it *used*; one held by retired sequences alone is a prefix cache entry, which may be
evicted at any time.
"""

from __future__ import annotations

from collections import Counter


class KVBudget:
    """Pages of `page_size` tokens.

    A fork shares whole pages and copies a part of one, as TVM's does.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._pages: dict[int, list[int]] = {}  # sequence -> its pages
        self._lengths: dict[int, int] = {}
        self._holders: Counter[int] = Counter()  # page -> sequences
        self._live_holders: Counter[int] = Counter()
        self._retired: set[int] = set()
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that live sequences hold."""
        return len(self._live_holders)

    @property
    def num_evictable(self) -> int:
        """Pages that only retired sequences hold."""
        return len(self._holders) - len(self._live_holders)

    def num_evictable_beside(self, seq_id: int, num_tokens: int) -> int:
        """The same, but for the pages in which this sequence has whole pages of its head."""
        head = self._pages[seq_id][: num_tokens // self.page_size]
        return self.num_evictable - sum(page not in self._live_holders for page in head)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def length(self, seq_id: int) -> int:
        return self._lengths[seq_id]

    def needed(self, seq_id: int, num_tokens: int) -> int:
        """New pages that appending so many tokens takes."""
        return self.pages_for(self._lengths[seq_id] + num_tokens) - len(self._pages[seq_id])

    def room(self, seq_id: int, num_pages: int) -> int:
        """How many tokens can be appended with so many new pages."""
        held = len(self._pages[seq_id])
        return (held + num_pages) * self.page_size - self._lengths[seq_id]

    def add(self, seq_id: int) -> None:
        assert seq_id not in self._pages, f"sequence {seq_id} is already accounted for"
        self._pages[seq_id], self._lengths[seq_id] = [], 0

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        assert num_tokens <= self._lengths[parent_id]
        self.add(child_id)
        for page in self._pages[parent_id][: num_tokens // self.page_size]:
            self._hold(child_id, page)
        self._lengths[child_id] = num_tokens - num_tokens % self.page_size
        self.append(child_id, num_tokens % self.page_size)

    def append(self, seq_id: int, num_tokens: int) -> None:
        for _ in range(self.needed(seq_id, num_tokens)):
            self._hold(seq_id, self._free.pop())
        self._lengths[seq_id] += num_tokens

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        """Forget the last tokens, with which no other sequence has been forked.

        So the page that is cut is nobody else's: cutting a shared one would take a page for a copy.
        """
        length, pages = self._lengths[seq_id] - num_tokens, self._pages[seq_id]
        while len(pages) > self.pages_for(length):
            self._drop(seq_id, pages.pop())
        assert length % self.page_size == 0 or self._holders[pages[-1]] == 1, "a shared page"
        self._lengths[seq_id] = length

    def retire(self, seq_id: int) -> None:
        """The sequence goes on holding its pages, but nobody waits for it."""
        self._retired.add(seq_id)
        for page in self._pages[seq_id]:
            _decrement(self._live_holders, page)

    def release(self, seq_id: int) -> None:
        for page in self._pages.pop(seq_id):
            self._drop(seq_id, page)
        self._retired.discard(seq_id)
        del self._lengths[seq_id]

    def _hold(self, seq_id: int, page: int) -> None:
        self._pages[seq_id].append(page)
        self._holders[page] += 1
        self._live_holders[page] += 1

    def _drop(self, seq_id: int, page: int) -> None:
        if seq_id not in self._retired:
            _decrement(self._live_holders, page)
        if _decrement(self._holders, page):
            self._free.append(page)


def _decrement(counter: Counter[int], page: int) -> bool:
    """Whether that was the last one."""
    counter[page] -= 1
    if counter[page]:
        return False
    del counter[page]
    return True
