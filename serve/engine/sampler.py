"""Choose each sequence's next token from its logits. Rows are independent.

A batch never changes a choice.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from serve.engine.runner import Logits
from serve.engine.sequence import SamplingParams, Sequence

Row = NDArray[np.float32]


def sample(logits: Logits, sequences: Seq[Sequence]) -> list[int | None]:
    """The next token of each sequence; row i of `logits` (batch, vocab) belongs to sequences[i].

    Draws exactly one number from a sequence's generator for each sampled token, so a seed gives the
    same tokens after a preemption too. Raises FloatingPointError if a row holds NaN.
    """
    greedy = np.argmax(logits, axis=1)
    return [
        _checked(row, int(best)) if _is_plain_greedy(sequence) else _choose(row, sequence)
        for row, best, sequence in zip(logits, greedy, sequences, strict=True)
    ]


def _is_plain_greedy(sequence: Sequence) -> bool:
    params = sequence.params
    return params.temperature == 0 and not _changes_logits(params) and not _bars_stop(sequence)


def _changes_logits(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.logit_bias
    )


def _bars_stop(sequence: Sequence) -> bool:
    params = sequence.params
    return sequence.num_generated < params.min_tokens and bool(params.stop_token_ids)


def _choose(logits: Row, sequence: Sequence) -> int | None:
    row = adjust(logits, sequence)
    if sequence.params.temperature == 0:
        return _checked(row, int(np.argmax(row)))
    return _draw(row, sequence.params, sequence.rng.random())


def _checked(row: Row, token_id: int) -> int | None:
    """The token, unless its logit is NaN (argmax of a row with NaN is the NaN) or ruled out."""
    return token_id if row[token_id] > -np.inf else None


def adjust(logits: Row, sequence: Sequence) -> Row:
    """Apply penalties, bias and the ban on early stop tokens; the given row is left as it was."""
    params, row = sequence.params, logits.copy()
    if params.repetition_penalty != 1:
        seen = np.unique(np.asarray(sequence.token_ids))
        scores = row[seen]
        factor = np.float32(params.repetition_penalty)
        row[seen] = np.where(scores > 0, scores / factor, scores * factor)
    counts = sequence.output_counts
    if counts and (params.presence_penalty or params.frequency_penalty):
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        row[ids] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        row[ids] += np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
    if _bars_stop(sequence):
        row[list(params.stop_token_ids)] = -np.inf
    return row


def _draw(row: Row, params: SamplingParams, uniform: float) -> int | None:
    """Inverse-CDF sampling over the tokens that top-k, min-p and top-p keep, in that order.

    Tokens that tie with the last one kept are kept too.
    """
    best = row.max()
    if not np.isfinite(best):
        return None
    weights = np.exp((row - best) / np.float32(params.temperature))  # the best token's weight is 1
    if 0 < params.top_k < len(row):
        kth = np.partition(row, -params.top_k)[-params.top_k]
        weights[row < kth] = 0
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    if params.top_p < 1:
        weights[weights < _nucleus_threshold(weights, params.top_p)] = 0
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


def _nucleus_threshold(weights: Row, top_p: float) -> np.float32:
    """The smallest weight of the nucleus: the fewest tokens that hold `top_p` of the mass."""
    descending = np.sort(weights)[::-1]  # values only: several times faster than argsort
    cumulative = np.cumsum(descending, dtype=np.float64)
    last = int(np.searchsorted(cumulative, top_p * cumulative[-1]))
    return np.float32(descending[min(last, len(descending) - 1)])
