"""transformers on torch: the greedy loop over its own KV cache, a static batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.peers.protocol import Generated, Load

PACKAGES = ("transformers", "torch")


def prepare(folder: Path, cache: Path) -> Path:  # noqa: ARG001
    """It reads the folder itself."""
    return folder


class TransformersEngine:
    """AutoModelForCausalLM in f32, with its default attention."""

    def __init__(self, load: Load) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(load.threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(load.model, dtype=torch.float32)
        self._model.eval()
        self.settings: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "dtype": str(self._model.dtype),
            "attention": self._model.config._attn_implementation,
            "batching": "static",
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        torch = self._torch
        with torch.inference_mode():
            start = time.perf_counter()
            ids, cache = torch.tensor(prompts), None
            steps = []
            for step in range(new_tokens):
                out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                steps.append(ids)
                if not step:
                    first = time.perf_counter()
            tokens = torch.cat(steps, 1).tolist()
            return Generated(first - start, time.perf_counter() - start, tokens)

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        torch = self._torch
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1]
            return dict(enumerate(logits.double().log_softmax(-1).tolist()))

    def close(self) -> None:
        """Nothing runs by itself."""


load = TransformersEngine
