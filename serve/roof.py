"""This machine's roof: the arithmetic and the memory traffic that it can do at best, measured.

Peak: multiply-adds on registers alone, by a kernel compiled for the backend's target; and beside it
a product of two matrices by numpy, whose library runs on threads of its own. Bandwidth: a sum over
a buffer much larger than any cache. Both kernels run on the calling thread's pool of TVM threads,
so make the runner first. What fits into the last cache can be read faster than this roof says.
"""

# The kernels are TVMScript.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
import tvm
from tvm.script import tirx as T  # noqa: N812

from serve.backends import Backend

TASKS = 64  # shared out among the threads
ACCUMULATORS = 12  # independent chains: more than a core has multiply-adds in flight
LANES = (4, 8, 16)  # tried: a vector register of each kind of processor
STEPS = 200_000  # of each accumulator: some milliseconds a task
BUFFER_BYTES = 512 << 20
MATMUL_SIZE = 2048


@dataclass(frozen=True)
class Roof:
    """GFLOP/s and GB/s (1e9), the best of several runs."""

    fma_gflops: float
    matmul_gflops: float
    read_gbps: float

    @property
    def gflops(self) -> float:
        """The larger of the two: what can be achieved."""
        return max(self.fma_gflops, self.matmul_gflops)

    def seconds(self, flop: float, num_bytes: float) -> float:
        """The least time for a kernel of this work: max(FLOP / peak, bytes / bandwidth)."""
        return max(flop / self.gflops, num_bytes / self.read_gbps) / 1e9

    def best(self, other: Roof) -> Roof:
        """Of two measurements, each figure's higher one: what else runs can only lower it."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Roof(*(max(pair) for pair in pairs))

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"gflops": self.gflops}


def measure_roof(
    backend: Backend, *, steps: int = STEPS, buffer_bytes: int = BUFFER_BYTES,
    matmul_size: int = MATMUL_SIZE, repetitions: int = 2,
) -> Roof:  # fmt: skip
    """Of a CPU, in two or three seconds. The numbers make it smaller, for tests."""
    target = tvm.target.Target(backend.target())
    return Roof(
        max(_fma_gflops(target, lanes, steps, repetitions) for lanes in LANES),
        _matmul_gflops(matmul_size, repetitions),
        _read_gbps(target, buffer_bytes, repetitions),
    )


def _fma_gflops(target: Any, lanes: int, steps: int, repetitions: int) -> float:
    """x = x * a + b, `steps` times, which tends to b / (1 - a)."""
    run = tvm.compile(_fma_kernel(lanes), target=target)["main"]
    factors = tvm.runtime.tensor(np.array([0.5, 1.0], np.float32))
    out = tvm.runtime.tensor(np.zeros((TASKS, ACCUMULATORS, lanes), np.float32))
    seconds = _best(lambda: run(factors, out, steps), repetitions)
    if steps > 50 and not np.allclose(out.numpy(), 2.0):
        raise AssertionError("the probe's multiply-adds are not what was computed")
    return 2 * TASKS * ACCUMULATORS * lanes * steps / seconds / 1e9


def _matmul_gflops(size: int, repetitions: int) -> float:
    a = np.ones((size, size), np.float32)
    return 2 * size**3 / _best(lambda: a @ a, repetitions) / 1e9


def _read_gbps(target: Any, num_bytes: int, repetitions: int) -> float:
    columns = max(1, num_bytes // 4 // TASKS // 64)
    run = tvm.compile(_sum_kernel(columns), target=target)["main"]
    source = tvm.runtime.tensor(np.ones((TASKS, columns, 64), np.float32))
    out = tvm.runtime.tensor(np.zeros((TASKS, 64), np.float32))
    seconds = _best(lambda: run(source, out), repetitions)
    if not np.allclose(out.numpy(), columns):
        raise AssertionError("the probe's sum is not what was computed")
    return 4 * TASKS * columns * 64 / seconds / 1e9


def _best(run: Callable[[], object], repetitions: int) -> float:
    """Seconds; a first run, which sets things up, is not counted."""
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _fma_kernel(lanes: int) -> Any:
    @T.prim_func(s_tir=True)
    def main(factors_: T.handle, out_: T.handle, steps: T.int32):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        factors = T.match_buffer(factors_, (2,), "float32")
        out = T.match_buffer(out_, (TASKS, ACCUMULATORS, lanes), "float32")
        for task in T.parallel(TASKS):
            x = T.alloc_buffer((ACCUMULATORS * lanes,), "float32", scope="local")
            for a in T.unroll(ACCUMULATORS):
                for lane in T.vectorized(lanes):
                    x[a * lanes + lane] = T.Cast("float32", a * lanes + lane)
            for _ in T.serial(steps):
                for a in T.unroll(ACCUMULATORS):
                    for lane in T.vectorized(lanes):
                        x[a * lanes + lane] = x[a * lanes + lane] * factors[0] + factors[1]
            for a in T.unroll(ACCUMULATORS):
                for lane in T.vectorized(lanes):
                    out[task, a, lane] = x[a * lanes + lane]

    return main


def _sum_kernel(columns: int) -> Any:
    @T.prim_func(s_tir=True)
    def main(source_: T.handle, out_: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        source = T.match_buffer(source_, (TASKS, columns, 64), "float32")
        out = T.match_buffer(out_, (TASKS, 64), "float32")
        for task in T.parallel(TASKS):
            total = T.alloc_buffer((64,), "float32", scope="local")
            for lane in T.vectorized(64):
                total[lane] = T.float32(0)
            for column in T.serial(columns):
                for lane in T.vectorized(64):
                    total[lane] = total[lane] + source[task, column, lane]
            for lane in T.vectorized(64):
                out[task, lane] = total[lane]

    return main
