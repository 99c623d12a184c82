"""The process that bench.http measures: the engine over a runner that computes nothing.

`python -m bench.http_server direct CONCURRENCY` reads the engine's streams in the same loop;
`python -m bench.http_server serve [PROFILE.json]` puts the whole HTTP server in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import json
import pstats
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import uvicorn
import uvloop

from serve.api.app import ServedModel, ServedModels, create_app
from serve.engine import Chunk, Engine, EngineConfig, Logits, RunnerLimits, SamplingParams
from serve.metrics import EngineMetrics, Registry, render
from serve.protocol import Protocol
from serve.tokenizer import Tokenizer

MAX_BATCH = 64
REQUEST_TOKENS = 256  # of each answer
WORKLOAD_TOKENS = 1 << 15  # of all answers of a measurement
PROMPT = [15137, 4776, 290]  # Four score and
TOKEN = 262  # " the"
PROFILE_LINES = 15


class InstantRunner:
    """Logits that are always the same, at no cost."""

    def __init__(self) -> None:
        self.limits = RunnerLimits(
            vocab_size=50257,
            max_context=1024,
            max_batch=MAX_BATCH,
            max_step_tokens=512,
            page_size=16,
            num_pages=MAX_BATCH * 1024 // 16,
        )
        self._logits = np.zeros((self.limits.max_step_tokens, self.limits.vocab_size), np.float32)
        self._logits[:, TOKEN] = 1.0

    def add(self, seq_id: int) -> None:
        """Nothing is kept."""

    def fork(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Nothing is kept."""

    def prefill(self, chunks: Sequence[Chunk]) -> Logits:
        return self._logits[: len(chunks)]

    def decode(self, seq_ids: Sequence[int], token_ids: Sequence[int]) -> Logits:  # noqa: ARG002
        return self._logits[: len(seq_ids)]

    def verify(self, chunks: Sequence[Chunk]) -> Logits:
        return self._logits[: sum(len(chunk.token_ids) for chunk in chunks)]

    def rollback(self, seq_id: int, num_tokens: int) -> None:
        """Nothing is kept."""

    def release(self, seq_id: int) -> None:
        """Nothing is kept."""

    def num_free_pages(self) -> int:
        return self.limits.num_pages


def make_engine(registry: Registry) -> Engine:
    metrics = EngineMetrics(registry, "instant", "none", "none", lambda: engine.gauges())
    config = EngineConfig(max_running=MAX_BATCH, prefix_sharing=False)
    engine = Engine(InstantRunner(), config, metrics)
    engine.start()
    return engine


# -- without HTTP


async def direct(concurrency: int) -> float:
    """Tokens per second of so many streams at a time, read as the HTTP layer reads them."""
    engine = make_engine(Registry())
    params = SamplingParams(max_tokens=REQUEST_TOKENS, temperature=0)

    async def client(num_requests: int) -> None:
        for _ in range(num_requests):
            async for _event in engine.submit(PROMPT, params):
                pass

    await client(1)
    num_requests = WORKLOAD_TOKENS // REQUEST_TOKENS // concurrency
    start = time.perf_counter()
    await asyncio.gather(*(client(num_requests) for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    await engine.drain(0)
    return concurrency * num_requests * REQUEST_TOKENS / seconds


# -- with it


async def serve(registry: Registry, profile: cProfile.Profile | None = None) -> None:
    """Until SIGTERM; the port is the first line of the output."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn raises it again when it has ended
    engine = make_engine(registry)
    model = ServedModel(
        name="instant",
        aliases=("instant@none",),
        backend="none",
        profile="none",
        quantization="none",
        max_context=engine.limits.max_context,
        digest="none",
        created=0,
        tokenizer=Tokenizer.bundled(),
        engine=engine,
    )
    app = create_app(ServedModels([model]), lambda: render(registry), registry.observe_http)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        print(sock.getsockname()[1], flush=True)
        config = uvicorn.Config(
            app, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False
        )
        with profile or contextlib.nullcontext():
            await uvicorn.Server(config).serve(sockets=[sock])
    await engine.drain(0)


def write_profile(profile: cProfile.Profile, file: Path) -> None:
    """Own seconds of the functions that took most of the loop's thread."""
    stats = pstats.Stats(profile).get_stats_profile()
    functions = sorted(stats.func_profiles.items(), key=lambda item: -item[1].tottime)
    lines = [
        {
            "function": f"{Path(found.file_name).name}:{name}" if found.line_number else name,
            "calls": int(found.ncalls.partition("/")[0]),
            "seconds": found.tottime,
        }
        for name, found in functions[:PROFILE_LINES]
    ]
    report = {"seconds": stats.total_tt, "functions": lines}
    file.write_text(json.dumps(report), encoding="utf-8")


def main(what: str, *arguments: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if what == "direct":
            print(runner.run(direct(int(arguments[0]))))
        elif arguments:
            profile = cProfile.Profile()
            runner.run(serve(Registry(), profile))
            write_profile(profile, Path(arguments[0]))
        else:
            runner.run(serve(Registry()))


if __name__ == "__main__":
    main(*sys.argv[1:])
