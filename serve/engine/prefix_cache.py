"""Finds a sequence whose KV pages a new prompt can share. Knows tokens, not pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from serve.engine.sequence import Sequence


class PrefixCache:
    """The finished sequences whose KV pages are kept, least recently useful first."""

    def __init__(self, max_entries: int, min_tokens: int) -> None:
        self._entries: OrderedDict[int, Sequence] = OrderedDict()
        self._max_entries, self._min_tokens = max_entries, min_tokens

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, sequence: Sequence, live: Iterable[Sequence]) -> tuple[Sequence, int] | None:
        """The live or kept sequence with the longest common head, and that head's length in tokens.

        At least one token is left to compute, since its logits are needed.
        """
        if sequence.share_key is None:
            return None
        wanted = sequence.token_ids[:-1]
        best: Sequence | None = None
        length = self._min_tokens - 1  # to be surpassed
        for other in (*self._entries.values(), *live):
            if other is sequence or other.share_key != sequence.share_key:
                continue
            if min(len(wanted), other.num_computed) <= length:
                continue
            if other.token_ids[length] != wanted[length]:  # rules out nearly all others at once
                continue
            common = common_prefix(wanted, other.token_ids[: other.num_computed])
            if common > length:
                best, length = other, common
        if best is None:
            return None
        if best.seq_id in self._entries:
            self._entries.move_to_end(best.seq_id)
        return best, length

    def keep(self, sequence: Sequence) -> bool:
        """Keep a finished sequence, unless it could never be shared or another one covers it."""
        if sequence.share_key is None or sequence.num_computed < self._min_tokens:
            return False
        if any(_covers(other, sequence) for other in self._entries.values()):
            return False
        self._entries[sequence.seq_id] = sequence
        return True

    def overflow(self) -> int | None:
        """The sequence to give up because too many are kept, if any."""
        return self.evict() if len(self._entries) > self._max_entries else None

    def evict(self) -> int | None:
        """Forget the least recently useful sequence and return its id."""
        return self._entries.popitem(last=False)[0] if self._entries else None


def _covers(other: Sequence, sequence: Sequence) -> bool:
    """Whether all that is computed of `sequence` is computed of the other, too."""
    length = sequence.num_computed
    if other.share_key != sequence.share_key or other.num_computed < length:
        return False
    return other.token_ids[:length] == sequence.token_ids[:length]


def common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the common head, by bisection over slice comparisons (which run in C)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
