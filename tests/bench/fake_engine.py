"""An engine without a model, for a real worker process: `tests.bench.fake_engine`.

The option `behaviour`: crash, raise, hang or short, at the first generation; or `missing` at load.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.peers.protocol import Generated, Load

PACKAGES = ("pytest", "no-such-package")


def prepare(folder: Path, cache: Path) -> Path:  # noqa: ARG001
    print("preparing, on standard output")  # must not get into the replies
    return folder


class FakeEngine:
    """Each token is one more than the last one."""

    def __init__(self, load: Load) -> None:
        self._behaviour = load.options.get("behaviour", "")
        self.settings: dict[str, Any] = {"threads": os.environ["OMP_NUM_THREADS"]}
        if self._behaviour == "missing":
            import_module("no_such_module")

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        if self._behaviour == "crash":
            print("a last word", file=sys.stderr, flush=True)
            os._exit(3)
        if self._behaviour == "raise":
            raise ValueError("no such luck")
        if self._behaviour == "hang":
            time.sleep(60)
        count = new_tokens - (self._behaviour == "short")
        return Generated(0.5, 2.0, [[row[-1] + 1 + n for n in range(count)] for row in prompts])

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        return {prompt[-1] + 1: 0.0, 7: -5.0 if self._behaviour == "other" else -4.0}

    def close(self) -> None:
        """Nothing to end."""


load = FakeEngine
