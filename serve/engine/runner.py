"""What the engine needs of a model: the ModelRunner protocol.

TVM's is in serve/runtime, the tests' in tests/fakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]  # (rows, vocab)
Row = NDArray[np.float32]  # (vocab,)


@dataclass(frozen=True)
class RunnerLimits:
    """Fixed capacities of a runner."""

    vocab_size: int
    max_context: int  # tokens of one sequence, prompt and completion; all pages can hold as many
    max_batch: int  # sequences in one step
    max_step_tokens: int  # tokens in one prefill step, over all its sequences
    page_size: int  # tokens per KV page
    num_pages: int  # KV pages in all
    batch_invariant: bool = False  # logits do not depend on the call, nor on what else is in it


@dataclass(frozen=True)
class Chunk:
    """The next `token_ids` of a sequence, appended to what the KV cache already holds of it."""

    seq_id: int
    token_ids: Sequence[int]


class ModelRunner(Protocol):
    """One model on one device. Not thread-safe: one thread, the engine's, makes every call.

    Logits are float32 and belong to the caller. A failing call raises; the sequences of that call
    are then in an unknown state and must be released.
    """

    @property
    def limits(self) -> RunnerLimits: ...

    def add(self, seq_id: int) -> None:
        """Begin an empty sequence."""

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Begin `child_id` with the first `num_tokens` of the parent.

        Whole pages shared, a part of one copied.
        """

    def prefill(self, chunks: Sequence[Chunk]) -> Logits:
        """Append a chunk to each sequence.

        The logits after each chunk's last token, (len(chunks), vocab).
        """

    def decode(self, seq_ids: Sequence[int], token_ids: Sequence[int]) -> Logits:
        """Append one token to each sequence; the logits after it, (len(seq_ids), vocab)."""

    def verify(self, chunks: Sequence[Chunk]) -> Logits:
        """As prefill, with the logits after every token, (total tokens, vocab)."""

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        """Forget the last `num_tokens` of the sequence."""

    def release(self, seq_id: int) -> None:
        """End the sequence and free the pages that nobody else holds."""

    def num_free_pages(self) -> int:
        """KV pages that no sequence holds."""
