"""OpenVINO GenAI: exported by optimum-intel, run by its continuous batching pipeline."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.peers.kept import once
from bench.peers.protocol import Generated, Load

PACKAGES = ("openvino-genai", "openvino", "optimum-intel", "transformers")
BLOCK = 32  # KV positions: what the CPU plugin allots at a time


def prepare(folder: Path, cache: Path) -> Path:
    """`optimum-cli export openvino --weight-format fp32`."""
    cli = str(Path(sys.executable).with_name("optimum-cli"))
    what = ["--model", str(folder), "--task", "text-generation-with-past"]

    def export(target: Path) -> None:
        metadata.version("optimum-intel")
        command = [cli, "export", "openvino", *what, "--weight-format", "fp32", str(target)]
        subprocess.run(command, check=True)

    return once(cache / f"{folder.name}-openvino", export)


class OpenVINOEngine:
    """Everything that would be narrower than f32 by default is told to be f32."""

    def __init__(self, load: Load) -> None:
        import numpy as np
        import openvino
        import openvino_genai as genai

        self._np, self._openvino, self._genai = np, openvino, genai
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": load.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.num_kv_blocks = load.max_requests * (-(-load.max_context // BLOCK) + 1)
        scheduler.max_num_seqs = load.max_requests
        scheduler.max_num_batched_tokens = 2048
        self._pipeline: Any = genai.ContinuousBatchingPipeline(
            str(load.model), scheduler, "CPU", properties
        )
        self.settings: dict[str, Any] = properties | {"batching": "continuous"}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        config = self._config(new_tokens)
        arrays = [self._np.array([prompt], self._np.int64) for prompt in prompts]
        tensors = [self._openvino.Tensor(array) for array in arrays]
        start = time.perf_counter()
        handles = [self._pipeline.add_request(n, t, config) for n, t in enumerate(tensors)]
        tokens: list[list[int]] = [[] for _ in prompts]
        first = 0.0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for own, handle in zip(tokens, handles, strict=True):
                if handle.can_read():
                    for output in handle.read().values():
                        own += output.generated_ids
                        first = first or time.perf_counter()
        return Generated(first - start, time.perf_counter() - start, tokens)

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        """Of the chosen token: the pipeline tells no others."""
        config = self._config(1)
        config.logprobs = 1
        tensor = self._openvino.Tensor(self._np.array([prompt], self._np.int64))
        handle = self._pipeline.add_request(0, tensor, config)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        [output] = handle.read_all()
        return dict(zip(output.generated_ids, output.generated_log_probs, strict=True))

    def close(self) -> None:
        del self._pipeline

    def _config(self, new_tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        return config


load = OpenVINOEngine
