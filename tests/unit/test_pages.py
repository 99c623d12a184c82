"""Page accounting of our own, against sequences as plain lists of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, count

import pytest

from serve.runtime.pages import Pages, Tables

pytestmark = pytest.mark.unit

SIZE = 4


class Memory(Pages):
    """Pages with tokens in them, written and read as the kernels do: by the tables alone."""

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages, SIZE)
        self.slots = [[-1] * SIZE for _ in range(num_pages)]
        self.next_token = 0

    def copy(self, source: int, target: int) -> None:
        self.slots[target] = list(self.slots[source])

    def put(self, *steps: tuple[int, int]) -> list[list[int]]:
        """Append so many new tokens to these sequences: everything that each then has."""
        seq_ids, lengths = zip(*steps, strict=True)
        tables = self.append(seq_ids, lengths)
        assert {table.dtype.name for table in tables} == {"int32"}
        for row, position in enumerate(tables.positions):
            page, slot = where(tables, row, int(position))
            self.slots[page][slot] = self.next_token
            self.next_token += 1
        return [self.read(tables, end - 1) for end in accumulate(lengths)]

    def read(self, tables: Tables, row: int) -> list[int]:
        """All that this row's sequence has up to it."""
        at = [where(tables, row, position) for position in range(tables.positions[row] + 1)]
        return [self.slots[page][slot] for page, slot in at]


def where(tables: Tables, row: int, position: int) -> tuple[int, int]:
    """A position's page and slot in it."""
    return int(tables.numbers[tables.starts[row] + position // SIZE]), position % SIZE


def test_the_tables_of_a_step() -> None:
    pages = Memory(8)
    pages.add(7)
    pages.add(8)
    tables = pages.append([7, 8], [5, 1])
    assert [t.tolist() for t in tables] == [[0, 1, 2, 3, 4, 0], [0] * 5 + [2], [0, 1, 2]]
    tables = pages.append([8, 7], [1, 4])
    assert [t.tolist() for t in tables] == [[1, 5, 6, 7, 8], [0] + [1] * 4, [2, 0, 1, 3]]
    assert pages.num_free == 4


@pytest.mark.parametrize(("num_tokens", "taken"), [(0, 0), (1, 1), (4, 0), (5, 1), (8, 0), (9, 1)])
def test_a_fork_shares_whole_pages_and_copies_a_part(num_tokens: int, taken: int) -> None:
    pages = Memory(8)
    pages.add(0)
    [tokens] = pages.put((0, 9))
    pages.fork(0, 1, num_tokens)
    assert pages.num_free == 8 - 3 - taken
    assert pages.put((1, 1)) == [[*tokens[:num_tokens], 9]]
    assert pages.put((0, 1)) == [[*tokens, 10]]
    pages.release(0)
    assert pages.put((1, 1)) == [[*tokens[:num_tokens], 9, 11]]
    pages.release(1)
    assert pages.num_free == 8


def test_a_rollback_into_a_shared_page_copies_it() -> None:
    pages = Memory(8)
    pages.add(0)
    [tokens] = pages.put((0, 8))
    pages.fork(0, 1, 8)
    pages.rollback(0, 5)
    assert pages.put((0, 2)) == [[*tokens[:3], 8, 9]]
    assert pages.put((1, 1)) == [[*tokens, 10]]


@pytest.mark.parametrize("seed", range(8))
def test_a_storm(seed: int) -> None:
    """Random operations, also such as there is no room for: every sequence keeps its tokens."""
    chance, pages = random.Random(seed), Memory(24)
    known: dict[int, list[int]] = {}
    new_ids = count()

    def add() -> None:
        new = next(new_ids)
        pages.add(new)
        known[new] = []

    def fork() -> None:
        parent, new = chance.choice(list(known)), next(new_ids)
        shared = chance.randint(0, len(known[parent]))
        pages.fork(parent, new, shared)
        known[new] = known[parent][:shared]

    def append() -> None:
        chosen = chance.sample(list(known), chance.randint(1, min(3, len(known))))
        steps = [(seq_id, chance.randint(1, 6)) for seq_id in chosen]
        first = pages.next_token
        found = pages.put(*steps)
        for (seq_id, size), tokens in zip(steps, found, strict=True):
            known[seq_id] += range(first, first + size)
            first += size
            assert tokens == known[seq_id]

    def rollback() -> None:
        seq_id = chance.choice(list(known))
        forgotten = chance.randint(0, len(known[seq_id]))
        pages.rollback(seq_id, forgotten)
        del known[seq_id][len(known[seq_id]) - forgotten :]

    def release() -> None:
        seq_id = chance.choice(list(known))
        pages.release(seq_id)
        del known[seq_id]

    operations: list[Callable[[], None]] = [fork, append, append, append, rollback, release]
    refused = 0
    for _ in range(600):
        free = pages.num_free
        try:
            (chance.choice(operations) if known else add)()
        except RuntimeError:
            refused += 1
            assert pages.num_free == free
            release()
    assert refused > 5
    for seq_id in list(known):
        pages.release(seq_id)
    assert pages.num_free == 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pages: pages.add(0), "there is a sequence 0 already"),
        (lambda pages: pages.fork(0, 0, 1), "there is a sequence 0 already"),
        (lambda pages: pages.fork(5, 1, 1), "there is no sequence 5"),
        (lambda pages: pages.fork(0, 1, 7), "7 tokens of sequence 0, which has 6"),
        (lambda pages: pages.fork(0, 1, -1), "-1 tokens of sequence 0"),
        (lambda pages: pages.append([0, 5], [1, 1]), "there is no sequence 5"),
        (lambda pages: pages.append([0, 0], [1, 1]), r"a step of sequences \[0, 0\]"),
        (lambda pages: pages.append([0], [0]), r"a step of sequences \[0\], \[0\] tokens"),
        (lambda pages: pages.append([], []), r"a step of sequences \[\]"),
        (lambda pages: pages.rollback(5, 1), "there is no sequence 5"),
        (lambda pages: pages.rollback(0, 7), "7 tokens of sequence 0, which has 6"),
        (lambda pages: pages.release(5), "there is no sequence 5"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[Memory], None], message: str) -> None:
    pages = Memory(3)
    pages.add(0)
    [tokens] = pages.put((0, 6))
    with pytest.raises(ValueError, match=message):
        call(pages)
    assert pages.num_free == 1
    assert pages.put((0, 1)) == [[*tokens, 6]]


def test_too_few_pages() -> None:
    pages = Memory(3)
    pages.add(0)
    pages.add(1)
    [tokens] = pages.put((0, 6))
    with pytest.raises(RuntimeError, match="2 more KV pages needed, 1 are free"):
        pages.append([0, 1], [1, 5])
    pages.fork(0, 2, 5)
    with pytest.raises(RuntimeError, match="1 more KV pages needed, 0 are free"):
        pages.fork(0, 3, 5)
    with pytest.raises(RuntimeError, match="1 more KV pages needed, 0 are free"):
        pages.rollback(0, 3)
    assert pages.put((0, 2)) == [[*tokens, 6, 7]]
