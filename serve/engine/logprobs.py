"""Log-probabilities as a client sees them: of the model's own logits, before anything changes them.

Knows one row of logits at a time.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from serve.engine.runner import Row
from serve.engine.sequence import TokenLogprobs


def log_probabilities(row: Row, token_id: int, num_top: int) -> TokenLogprobs:
    """The token's, and the `num_top` best ones', best first; of equals the lower id comes first.

    Computed in float64. Raises ValueError where the row holds no distribution: NaN, +inf, or
    nothing but -inf.
    """
    best = row.max()
    if not np.isfinite(best):
        raise ValueError(f"the logits hold no distribution: the largest is {best}")
    shifted = row.astype(np.float64) - float(best)
    total = math.log(np.exp(shifted).sum())
    top = tuple((int(i), float(shifted[i]) - total) for i in _best(row, num_top))
    return TokenLogprobs(float(shifted[token_id]) - total, top)


def _best(row: Row, number: int) -> NDArray[np.int64]:
    if not number:
        return np.empty(0, np.int64)
    number = min(number, len(row))
    least = np.partition(row, -number)[-number]
    ids = np.flatnonzero(row >= least)
    return ids[np.argsort(-row[ids], kind="stable")[:number]]
