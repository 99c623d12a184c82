"""Ours: the runner itself for one request at a time, the engine for several at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.protocol import Generated, Load
from serve import loading
from serve.backends import get_backend
from serve.config import Settings, load_settings
from serve.engine import Chunk, Engine, FinishEvent, Logits, SamplingParams, TokenEvent
from serve.runtime.runner import TVMRunner
from serve.runtime.weights import DeviceWeights

PACKAGES = ("dlight-serve", "apache-tvm", "numpy")
PAGE = 16  # KV positions; the runner's caches are whole pages


def prepare(folder: Path, cache: Path) -> Path:  # noqa: ARG001
    """Nothing to convert; libraries are compiled into their own cache, at the first load."""
    return folder


def load(load: Load) -> OursAlone | OursAtOnce:
    """options are settings of serve.toml by their dotted keys, such as library.profile."""
    settings = load_settings(flags={**load.options, "model.source": str(load.model)})
    runner, known = _runner(load, settings)
    if load.max_requests == 1:
        return OursAlone(runner, known)
    return OursAtOnce(runner, known, settings, load.max_requests)


def _runner(load: Load, settings: Settings) -> tuple[TVMRunner, dict[str, Any]]:
    """The runner with a KV cache just large enough, and what to report of it."""
    chosen = loading.select(settings)
    library = chosen.compile(settings, lambda _: None).library
    kv_tokens = load.max_requests * -(-load.max_context // PAGE) * PAGE
    config = replace(
        settings.runner,
        threads=load.threads,
        max_batch=load.max_requests,
        kv_tokens=kv_tokens,
    )
    backend = get_backend(settings.library.backend)
    weights = DeviceWeights(chosen.model.load(), backend.device())
    known = {
        "profile": chosen.profile.name,
        "library_digest": library.manifest.digest,
        "quantization": library.manifest.quantization,
        "threads": load.threads,
        "kv_tokens": kv_tokens,
        "kv_cache_bytes": kv_tokens * chosen.model.config.kv_bytes_per_token(),
        "weights_bytes": chosen.model.config.num_parameters * 4,
    }
    return TVMRunner(library, weights, backend, config), known


class OursAlone:
    """The runner, as `dlight-serve bench` drives it."""

    def __init__(self, runner: TVMRunner, settings: dict[str, Any]) -> None:
        self._runner, self.settings = runner, settings

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        [prompt] = prompts
        runner = self._runner
        runner.add(0)
        try:
            start = time.perf_counter()
            tokens = [int(np.argmax(self._prefill(prompt)))]
            first = time.perf_counter()
            while len(tokens) < new_tokens:
                tokens.append(int(np.argmax(runner.decode([0], [tokens[-1]]))))
            return Generated(first - start, time.perf_counter() - start, [tokens])
        finally:
            runner.release(0)

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        self._runner.add(0)
        try:
            logits = self._prefill(prompt)[0].astype(np.float64)
        finally:
            self._runner.release(0)
        shifted = logits - logits.max()
        return dict(enumerate((shifted - np.log(np.exp(shifted).sum())).tolist()))

    def close(self) -> None:
        """Nothing runs by itself."""

    def _prefill(self, prompt: Sequence[int]) -> Logits:
        step = self._runner.limits.max_step_tokens
        for begin in range(0, len(prompt), step):
            logits = self._runner.prefill([Chunk(0, prompt[begin : begin + step])])
        return logits


class OursAtOnce:
    """The real engine: continuous batching in its own thread. Shares no prefixes."""

    def __init__(
        self, runner: TVMRunner, settings: dict[str, Any], own: Settings, max_requests: int
    ) -> None:
        config = replace(own.engine, max_running=max_requests, prefix_sharing=False)
        self.settings = settings | {"prefill_chunk_tokens": config.prefill_chunk_tokens}
        self._engine = Engine(runner, config)
        self._engine.start()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        return asyncio.run(self._generate(prompts, new_tokens))

    async def _generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        params = SamplingParams(max_tokens=new_tokens, temperature=0)
        start = time.perf_counter()
        firsts: list[float] = []

        async def one(prompt: list[int]) -> list[int]:
            tokens = []
            async for event in self._engine.submit(prompt, params, share_key=None):
                if isinstance(event, TokenEvent):
                    tokens.append(event.token_id)
                    if len(tokens) == 1:
                        firsts.append(time.perf_counter() - start)
                elif isinstance(event, FinishEvent) and event.error is not None:
                    raise event.error
            return tokens

        tokens = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return Generated(min(firsts), time.perf_counter() - start, list(tokens))

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        raise NotImplementedError("the engine gives tokens only")

    def close(self) -> None:
        asyncio.run(self._engine.drain(0))
