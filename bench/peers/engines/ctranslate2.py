"""CTranslate2: converted by its own converter, which needs transformers and torch beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from bench.peers.kept import once
from bench.peers.protocol import Generated, Load

PACKAGES = ("ctranslate2", "transformers", "torch")


def prepare(folder: Path, cache: Path) -> Path:
    """`ctranslate2.converters`, without quantization."""

    def convert(target: Path) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(folder)).convert(str(target), quantization="float32")

    return once(cache / f"{folder.name}-ctranslate2", convert)


class CTranslate2Engine:
    """A Generator, which takes and gives tokens by their text."""

    def __init__(self, load: Load) -> None:
        import ctranslate2

        self._threads = load.threads
        self._generator: Any = ctranslate2.Generator(
            str(load.model),
            device="cpu",
            compute_type="float32",
            inter_threads=1,
            intra_threads=load.threads,
        )
        self._texts: list[str] = json.loads((load.model / "vocabulary.json").read_text("utf-8"))
        self.settings: dict[str, Any] = {
            "threads": load.threads,
            "compute_type": self._generator.compute_type,
            "batching": "static",
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        """It forwards the prompt but for its last token, so the first new token is a step more."""
        texts = [[self._texts[token] for token in prompt] for prompt in prompts]
        first = 0.0

        def on_token(result: Any) -> bool:
            nonlocal first
            if not result.step and not first:
                first = time.perf_counter()
            return False

        start = time.perf_counter()
        results = self._generator.generate_batch(
            texts,
            max_length=new_tokens,
            min_length=new_tokens,  # which hides the end-of-text token
            include_prompt_in_result=False,
            sampling_topk=1,
            callback=on_token,
        )
        seconds = time.perf_counter() - start
        return Generated(first - start, seconds, [result.sequences_ids[0] for result in results])

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        import numpy as np

        logits = self._generator.forward_batch([prompt], return_log_probs=True)
        return dict(enumerate(np.array(logits)[0, -1].tolist()))

    def close(self) -> None:
        self._generator.unload_model()


load = CTranslate2Engine
