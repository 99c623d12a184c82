"""Models whose weights transformers and we share, and runners on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel

from profiles import load_profile
from serve.backends import get_backend
from serve.compiler.cache import LibraryCache
from serve.compiler.compile import CompileJob, get_library
from serve.model.source import ModelSource, find_model
from serve.runtime.config import RunnerConfig
from serve.runtime.runner import TVMRunner
from serve.runtime.weights import DeviceWeights

TOLERANCE = 2e-4  # on logits, in f32
PROFILES = ("baseline", "matmul", "gemv", "reduction", "full", "stock")
TOY = {"vocab_size": 1000, "n_positions": 384, "n_embd": 64, "n_layer": 2, "n_head": 4}


@dataclass(frozen=True)
class Judged:
    """A model in transformers' hands and in a folder for ours."""

    theirs: Any
    source: ModelSource

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """transformers' logits after every token, (len, vocab)."""
        with torch.inference_mode():
            out = self.theirs(torch.tensor([token_ids])).logits[0]
        array: NDArray[np.float32] = out.numpy()
        return array

    def greedy(self, token_ids: list[int], count: int) -> list[int]:
        """The `count` tokens that transformers would add."""
        ids, cache, new = torch.tensor([token_ids]), None, []
        with torch.inference_mode():
            for _ in range(count):
                out = self.theirs(ids, past_key_values=cache, use_cache=True)
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                new.append(int(ids))
        return new


MakeModel = Callable[..., Judged]
MakeRunner = Callable[..., TVMRunner]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A random model of these hyperparameters (TOY's otherwise), with logits of about ±10."""

    def make(**changes: Any) -> Judged:
        torch.manual_seed(0)
        others = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
        config = GPT2Config(**(TOY | others | changes))
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or ".ln_" in name:  # transformers makes these 0 and 1
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return Judged(model, find_model(str(folder)))

    return make


@pytest.fixture(scope="session")
def toy(make_model: MakeModel) -> Judged:
    return make_model()


@pytest.fixture(scope="session")
def library_cache(cache: Path) -> LibraryCache:
    return LibraryCache(cache)


@pytest.fixture(scope="session")
def make_runner(library_cache: LibraryCache) -> MakeRunner:
    def make(
        source: ModelSource, profile: str = "full", mcpu: str | None = None, **limits: Any
    ) -> TVMRunner:
        backend = get_backend("cpu", mcpu)
        job = CompileJob(source.config, backend, load_profile(profile))
        library = get_library(job, library_cache).library
        weights = DeviceWeights(source.load(), backend.device())
        return TVMRunner(library, weights, backend, RunnerConfig(**limits))

    return make


@pytest.fixture(scope="session")
def runner(toy: Judged, make_runner: MakeRunner) -> TVMRunner:
    """The toy under the full profile."""
    return make_runner(toy.source, max_batch=8, max_step_tokens=384, kv_tokens=2048)


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    """384 token ids: as many as the toy has positions."""
    return [int(i) for i in np.random.default_rng(7).integers(0, TOY["vocab_size"], 384)]


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Within the tolerance, and the same choice."""
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
