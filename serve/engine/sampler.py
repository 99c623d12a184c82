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

_SMALLEST = np.finfo(np.float32).tiny
_BLOCK = 256


def sample(logits: Logits, sequences: Seq[Sequence]) -> list[int | None]:
    """The next token of each sequence; row i of `logits` (batch, vocab) belongs to sequences[i].

    Draws exactly one number from a sequence's generator for each sampled token, so a seed gives the
    same tokens after a preemption too. None where no token can be chosen: the row holds NaN, or
    every token is ruled out.
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
        seen = np.array(sequence.token_ids, np.int64)  # repeats are read before any is written
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
        row[[i for i in params.stop_token_ids if 0 <= i < len(row)]] = -np.inf
    return row


def _draw(row: Row, params: SamplingParams, uniform: float) -> int | None:
    """Inverse-CDF sampling over the tokens that top-k, min-p and top-p keep, in that order.

    Tokens that tie with the last one kept are kept too.
    """
    best = row.max()
    if not np.isfinite(best):
        return None
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0
        scaled = (row - best) / max(np.float32(params.temperature), _SMALLEST)
    weights = np.exp(scaled)  # the best token's weight is 1
    if 0 < params.top_k < len(row):
        weights *= row >= np.partition(row, -params.top_k)[-params.top_k]
    if params.min_p > 0:
        weights *= weights >= min(params.min_p, 1.0)
    if params.top_p < 1:
        weights *= weights >= _nucleus_threshold(weights, params.top_p)
    return _locate(weights, uniform)


def _nucleus_threshold(weights: Row, top_p: float) -> np.float32:
    """The smallest weight of the nucleus: the fewest tokens that hold `top_p` of the mass."""
    ascending = np.sort(weights)  # values only: several times faster than argsort
    return np.float32(ascending[_locate(ascending, 1 - top_p)])


def _locate(weights: Row, fraction: float) -> int:
    """The first index up to which the weights sum to more than `fraction` of their whole sum.

    Its weight is never 0. Sums whole blocks first: a cumsum over the vocabulary costs ten times as
    much as all else here.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = fraction * sums[-1]
    block = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    before = sums[block - 1] if block else 0.0
    inside = np.cumsum(weights[starts[block] :][:_BLOCK], dtype=np.float64)
    index = int(np.searchsorted(inside, target - before, side="right"))
    last = int(np.searchsorted(inside, inside[-1]))  # the two sums of a block may round apart
    return int(starts[block]) + min(index, last)
