"""Guess a sequence's next tokens by prompt lookup: what followed the last time it read like this.

Knows the ids of one sequence. A guess costs nothing where it is right, and little elsewhere: the
model computes it beside the newest token (Saxena 2023, "Prompt Lookup Decoding").
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must be the same before a guess
_LONGEST_PAUSE = 31  # steps, after guesses of which none was right


class Drafter:
    """One sequence's guesses, at most `max_tokens` at a time.

    Guesses more while they are right, and fewer and more seldom while they are wrong.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = self._size = max_tokens
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> the index after its latest place
        self._num_indexed = 1  # tokens that are known to follow
        self._pause = self._num_idle = 0  # steps: how long, and how many are left

    def guess(self, token_ids: Sequence[int], at_most: int) -> list[int]:
        """What may follow `token_ids`, which only ever grows; call it once a step."""
        if self._num_idle:
            self._num_idle -= 1
            return []
        self._index(token_ids)
        begin = self._find(token_ids)
        if begin is None:
            return []
        tokens = list(token_ids[begin:])
        size = min(at_most, self._size)
        while len(tokens) < size:  # what repeats until the end goes on repeating
            tokens.extend(tokens[: size - len(tokens)])
        return tokens[:size]

    def judge(self, num_drafted: int, num_accepted: int) -> None:
        """How many of its newest guess were right."""
        if num_accepted:
            grown = 2 * self._size if num_accepted == num_drafted else num_accepted + 1
            self._size, self._pause = min(grown, self._max_tokens), 0
        else:
            self._size = max(1, self._size // 2)
            self._pause = self._num_idle = min(2 * self._pause + 1, _LONGEST_PAUSE)

    def _index(self, token_ids: Sequence[int]) -> None:
        for index in range(self._num_indexed, len(token_ids)):
            for length in range(SHORTEST, min(LONGEST, index) + 1):
                self._follows[tuple(token_ids[index - length : index])] = index
        self._num_indexed = max(self._num_indexed, len(token_ids))

    def _find(self, token_ids: Sequence[int]) -> int | None:
        for length in range(LONGEST, SHORTEST - 1, -1):
            begin = self._follows.get(tuple(token_ids[-length:]))
            if begin is not None:
                return begin
        return None
