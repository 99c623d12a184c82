"""The sequences that wait, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from serve.engine.sequence import Sequence


class WaitingQueue:
    """Counts its tokens as sequences come and go: a step's gauges need no sum over thousands.

    That a sequence has the same tokens when it leaves as when it came is the batcher's matter.
    num_tokens: to prefill. num_completion_tokens: to come after them, at most.
    """

    def __init__(self) -> None:
        self._sequences: deque[Sequence] = deque()
        self.num_tokens = self.num_completion_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence:
        return self._sequences[0]

    def append(self, sequence: Sequence) -> None:
        self._sequences.append(sequence)
        self._count(sequence, 1)

    def put_back(self, sequence: Sequence) -> None:
        """As its head."""
        self._sequences.appendleft(sequence)
        self._count(sequence, 1)

    def pop(self) -> Sequence:
        """Its head."""
        sequence = self._sequences.popleft()
        self._count(sequence, -1)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self._sequences.remove(sequence)
        self._count(sequence, -1)

    def _count(self, sequence: Sequence, sign: int) -> None:
        self.num_tokens += sign * sequence.num_pending
        self.num_completion_tokens += sign * sequence.num_to_come
