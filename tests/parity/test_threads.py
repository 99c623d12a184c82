"""The runner uses the CPUs it was told to, in whatever thread calls it, and binds nobody to one."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import tvm

from serve.engine import Chunk
from tests.parity.conftest import Judged, MakeRunner

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int, toy: Judged, make_runner: MakeRunner, prompt: list[int]) -> None:
    seen: list[tuple[int, set[int]]] = []
    logits = []

    def run() -> None:
        runner = make_runner(toy.source, kv_tokens=512, threads=threads)
        runner.add(0)
        logits.append(runner.prefill([Chunk(0, prompt[:40])]))
        seen.append((tvm.get_global_func("runtime.NumThreads")(), os.sched_getaffinity(0)))

    thread = threading.Thread(target=run)  # a new one: a thread keeps the pool it began with
    thread.start()
    thread.join()
    assert seen == [(threads, os.sched_getaffinity(0))]
    assert np.abs(logits[0][0] - toy.logits(prompt[:40])[-1]).max() <= 2e-4
