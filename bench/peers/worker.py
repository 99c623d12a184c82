"""One engine in one process: `python -m bench.peers.worker ENGINE`, started by the driver.

Runs in the engine's own environment, which need not have anything of ours.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from bench.peers.protocol import Worker


def main(engine: str) -> None:
    """Speak the protocol on what were standard input and output; prints go to standard error.

    engine: a module of bench.peers.engines, or any other by its dotted name.
    """
    path = engine if "." in engine else f"bench.peers.engines.{engine}"
    module: Any = importlib.import_module(path)
    _start_again_with(getattr(module, "environment", dict)())
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    Worker(module).serve(sys.stdin, replies)


def _start_again_with(wanted: Mapping[str, str]) -> None:
    """What must be in the environment before the process begins, such as LD_PRELOAD."""
    if os.environ | wanted != os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | wanted)


if __name__ == "__main__":
    main(sys.argv[1])
