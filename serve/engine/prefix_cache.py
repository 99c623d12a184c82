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
        best: tuple[Sequence, int] | None = None
        for other in (*self._entries.values(), *live):
            if other is sequence or other.share_key != sequence.share_key:
                continue
            length = common_prefix(wanted, other.token_ids[: other.num_computed])
            if length >= self._min_tokens and (best is None or length > best[1]):
                best = (other, length)
        if best is not None and best[0].seq_id in self._entries:
            self._entries.move_to_end(best[0].seq_id)
        return best

    def keep(self, sequence: Sequence) -> bool:
        """Keep a finished sequence, unless it could never be shared or another one covers it."""
        if sequence.share_key is None or sequence.num_computed < self._min_tokens:
            return False
        tokens = sequence.token_ids[: sequence.num_computed]
        for other in self._entries.values():
            if other.share_key == sequence.share_key:
                covered = other.token_ids[: other.num_computed][: len(tokens)]
                if covered == tokens:
                    return False
        self._entries[sequence.seq_id] = sequence
        return True

    def overflow(self) -> int | None:
        """The sequence to give up because too many are kept, if any."""
        return self.evict() if len(self._entries) > self._max_entries else None

    def evict(self) -> int | None:
        """Forget the least recently useful sequence and return its id."""
        return self._entries.popitem(last=False)[0] if self._entries else None


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
