"""A sequence's logits are the same bits however it is computed: under our rules for the CPU.

Every sum runs in one fixed order: alone, in any batch, in any chunks, after a fork, by decoding.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.engine import Chunk
from serve.runtime.runner import TVMRunner

pytestmark = pytest.mark.parity

LENGTH = 150  # of the sequence; pages of 16, softmax in groups of 64


@pytest.fixture(scope="module")
def expected(runner: TVMRunner, prompt: list[int]) -> NDArray[np.float32]:
    """The logits after every token, all of them prefilled at once."""
    runner.add(0)
    logits = runner.verify([Chunk(0, prompt[:LENGTH])])
    runner.release(0)
    return logits


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 65, 149])
def test_prefill_of_less(
    runner: TVMRunner, prompt: list[int], expected: NDArray[np.float32], length: int
) -> None:
    runner.add(0)
    found = runner.prefill([Chunk(0, prompt[:length])])
    runner.release(0)
    assert_same_bits(found[0], expected[length - 1])


def test_token_by_token(
    runner: TVMRunner, prompt: list[int], expected: NDArray[np.float32]
) -> None:
    runner.add(0)
    for position in range(LENGTH):
        assert_same_bits(runner.decode([0], [prompt[position]])[0], expected[position])
    runner.release(0)


@pytest.mark.parametrize("seed", range(4))
def test_in_random_chunks_among_others(
    runner: TVMRunner, prompt: list[int], expected: NDArray[np.float32], seed: int
) -> None:
    """The others are in random states, each step's batch is in a random order."""
    chance = np.random.default_rng(seed)
    done = dict.fromkeys(range(4), 0)  # the sequences; 0 is the one that is looked at
    for seq_id in done:
        runner.add(seq_id)
    while done[0] < LENGTH:
        others = [int(i) for i in chance.permutation([1, 2, 3])[: chance.integers(0, 4)]]
        chunks = []
        for seq_id in [int(i) for i in chance.permutation([0, *others])]:
            begin, size = done[seq_id], int(chance.integers(1, 50))
            ids = prompt[begin : begin + size]
            ids = ids[: LENGTH - begin] if seq_id == 0 else [(i * 7 + seq_id) % 1000 for i in ids]
            chunks.append(Chunk(seq_id, ids))
            done[seq_id] += len(ids)
        row = [chunk.seq_id for chunk in chunks].index(0)
        assert_same_bits(runner.prefill(chunks)[row], expected[done[0] - 1])
    for seq_id in done:
        runner.release(seq_id)


def test_in_batches_of_decode(
    runner: TVMRunner, prompt: list[int], expected: NDArray[np.float32]
) -> None:
    """Alone and with one to seven others of other lengths."""
    for seq_id in range(8):
        runner.add(seq_id)
        runner.prefill([Chunk(seq_id, prompt[: 20 * seq_id + 1])])
    for step in range(8):
        seq_ids = list(range(step, -1, -1))
        at = [20 * seq_id + 1 + step - seq_id for seq_id in seq_ids]
        found = runner.decode(seq_ids, [prompt[position] for position in at])
        assert_same_bits(found, expected[at])
    for seq_id in range(8):
        runner.release(seq_id)


@pytest.mark.parametrize("position", [1, 15, 16, 17, 63, 64, 100])
def test_after_a_fork(
    runner: TVMRunner, prompt: list[int], expected: NDArray[np.float32], position: int
) -> None:
    runner.add(0)
    runner.prefill([Chunk(0, [*prompt[:position], 3, 1, 4])])
    runner.fork(0, 1, position)
    runner.decode([0], [1])  # into the page that the child's is a copy of
    found = runner.verify([Chunk(1, prompt[position:LENGTH])])
    assert_same_bits(found, expected[position:])
    runner.rollback(1, LENGTH - position)
    assert_same_bits(runner.decode([1], [prompt[position]])[0], expected[position])
    runner.release(0)
    runner.release(1)
