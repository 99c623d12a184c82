"""Choose a sequence's next token from its row of logits.

Knows one sequence at a time, so a batch never changes a choice.
"""

from __future__ import annotations

import numpy as np

from serve.engine.runner import Row
from serve.engine.sequence import SamplingParams, Sequence

_SMALLEST = np.finfo(np.float32).tiny
_BLOCK = 256


def choose(logits: Row, sequence: Sequence) -> int | None:
    """The sequence's next token, by its parameters and what it has so far; changes no logits.

    Draws exactly one number from the sequence's generator if it samples, so a seed gives the same
    tokens after a preemption too. None where no token can be chosen: the row holds NaN, or every
    token is ruled out.
    """
    row = adjust(logits, sequence) if _changes_logits(sequence) else logits
    if sequence.params.temperature == 0:
        return _checked(row, int(np.argmax(row)))
    return _draw(row, sequence.params, sequence.rng.random())


def _changes_logits(sequence: Sequence) -> bool:
    params = sequence.params
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.logit_bias
        or sequence.constraint is not None
        or _bars_stop(sequence)
    )


def _bars_stop(sequence: Sequence) -> bool:
    params = sequence.params
    return sequence.num_generated < params.min_tokens and bool(params.stop_token_ids)


def _checked(row: Row, token_id: int) -> int | None:
    """The token, unless its logit is NaN (argmax of a row with NaN is the NaN) or infinite."""
    return token_id if np.isfinite(row[token_id]) else None


def adjust(logits: Row, sequence: Sequence) -> Row:
    """Apply penalties, bias, grammar and the ban on early stop tokens.

    The given row is left as it was.
    """
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
    if sequence.constraint is not None:
        sequence.constraint.mask(row)
    if _bars_stop(sequence):
        _bar_stop(row, sequence)
    return row


def _bar_stop(row: Row, sequence: Sequence) -> None:
    """Rule the stop tokens out, unless a grammar allows nothing else."""
    stops = [i for i in sequence.params.stop_token_ids if 0 <= i < len(row)]
    scores = row[stops]
    row[stops] = -np.inf
    if sequence.constraint is not None and row.max() == -np.inf:
        row[stops] = scores


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
