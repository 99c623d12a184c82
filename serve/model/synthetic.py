"""Random weights of GPT-2's shapes, the same bits on every machine. For measuring.

The text is noise.

Only integer arithmetic, look-ups in one table and single IEEE operations touch the values. The
table is made in doubles, which another machine's `log` may round otherwise; no entry is so near the
middle of two float32 that it would matter (a test holds that).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from serve.model.config import GPT2Config
from serve.model.parameters import parameter_shapes

STANDARD_DEVIATION = 0.02
LEVELS = 1 << 16


class SyntheticWeights(Mapping[str, NDArray[np.float32]]):
    """N(0, 0.02) for every parameter; the gains of layer norms have 1 added.

    Made as they are asked for.
    """

    def __init__(self, config: GPT2Config, seed: int = 0) -> None:
        self._shapes, self._seed = parameter_shapes(config), seed

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        values = normal(f"{self._seed}:{name}", int(np.prod(self._shapes[name])))
        if ".ln_" in name and name.endswith(".weight"):
            values += np.float32(1)
        return values.reshape(self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def normal(key: str, count: int) -> NDArray[np.float32]:
    """`count` draws from N(0, 0.02), a function of `key` alone.

    16 random bits choose a quantile.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    words = np.random.PCG64(seed).random_raw(-(-count // 4))
    values: NDArray[np.float32] = _quantiles()[words.astype("<u8").view("<u2")[:count]]
    return values


@cache
def _quantiles() -> NDArray[np.float32]:
    inverse = NormalDist(0, STANDARD_DEVIATION).inv_cdf
    return np.array([inverse((i + 0.5) / LEVELS) for i in range(LEVELS)], np.float32)
