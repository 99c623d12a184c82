"""llama.cpp through llama-cpp-python's bindings of its C interface."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bench.peers.engines.gguf_file import write
from bench.peers.kept import once
from bench.peers.protocol import Generated, Load

PACKAGES = ("llama-cpp-python", "gguf", "numpy")
BATCH, MICRO_BATCH = 2048, 512  # tokens of one call, and of one pass over the weights: its defaults
F32, FLASH = 0, {"off": 0, "on": 1, "auto": -1}


def prepare(folder: Path, cache: Path) -> Path:
    """A GGUF file in f32."""
    return once(cache / f"{folder.name}.gguf", lambda file: write(folder, file))


class LlamaCppEngine:
    """A context whose KV cache is f32. options: flash_attention, `auto`, `on` or `off`."""

    def __init__(self, load: Load) -> None:
        import llama_cpp
        import numpy as np

        self._api, self._np = llama_cpp, np
        llama_cpp.llama_backend_init()
        flash = load.options.get("flash_attention", "auto")
        self._model = llama_cpp.llama_model_load_from_file(
            str(load.model).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"{load.model}: llama.cpp cannot load it")
        self._context = llama_cpp.llama_init_from_model(self._model, self._params(load, flash))
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context: see its log")
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.settings: dict[str, Any] = {
            "threads": load.threads,
            "kv": "f32",
            "flash_attention": flash,
            "batch": BATCH,
            "micro_batch": MICRO_BATCH,
            "batching": "all prompts, then all decode together",
        }

    def _params(self, load: Load, flash: str) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx = load.max_requests * -(-load.max_context // 256) * 256
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_seq_max = load.max_requests
        params.n_threads = params.n_threads_batch = load.threads
        params.type_k = params.type_v = F32
        params.flash_attn_type = FLASH[flash]
        params.no_perf = True
        return params

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated:
        self._api.llama_memory_clear(self._memory, False)
        start = time.perf_counter()
        tokens = [[self._best(row)] for row in self._prefill(prompts)]
        first = time.perf_counter()
        for step in range(new_tokens - 1):
            position = len(prompts[0]) + step
            entries = [(own[-1], position, n, True) for n, own in enumerate(tokens)]
            for own, row in zip(tokens, self._decode(entries), strict=True):
                own.append(self._best(row))
        return Generated(first - start, time.perf_counter() - start, tokens)

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        self._api.llama_memory_clear(self._memory, False)
        [row] = self._prefill([prompt])
        shifted = row.astype(self._np.float64) - row.max()
        return dict(enumerate((shifted - self._np.log(self._np.exp(shifted).sum())).tolist()))

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _prefill(self, prompts: list[list[int]]) -> list[Any]:
        """Logits after each prompt; as many tokens in a call as it takes."""
        entries = [
            (token, position, n, position == len(prompt) - 1)
            for n, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        rows = []
        for begin in range(0, len(entries), BATCH):
            rows += self._decode(entries[begin : begin + BATCH])
        return rows

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[Any]:
        """One call of (token, position, sequence, wants logits); copies of the wanted logits."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return [self._logits(i) for i, entry in enumerate(entries) if entry[3]]

    def _logits(self, row: int) -> Any:
        pointer = self._api.llama_get_logits_ith(self._context, row)
        return self._np.ctypeslib.as_array(pointer, (self._vocab_size,)).copy()

    def _best(self, logits: Any) -> int:
        return int(self._np.argmax(logits))


load = LlamaCppEngine
