"""Where a model comes from: `bundled:…`, `synthetic:…`, a local folder, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from serve.errors import ModelError
from serve.model.checkpoint import Checkpoint
from serve.model.config import SIZES, GPT2Config, read_config
from serve.model.hub import HubConfig, fetch
from serve.model.synthetic import SyntheticWeights

Weights = Mapping[str, NDArray[np.float32]]
BUNDLED = ("gettysburg",)


@dataclass(frozen=True)
class ModelSource:
    """A model found: `load()` gives its weights, one tensor at a time, as they are asked for.

    `folder` holds its files, if it has any; a model without tokenizer files speaks GPT-2's
    vocabulary. `is_noise`: the weights are random, for measuring only.
    """

    spec: str
    name: str
    config: GPT2Config
    load: Callable[[], Weights]
    folder: Path | None = None
    is_noise: bool = False


def find_model(spec: str, hub: HubConfig | None = None) -> ModelSource:
    """Find a model by its spec; reads config.json, and from the hub downloads what is missing.

    Raises ModelError saying what was looked for.
    """
    kind, colon, name = spec.partition(":")
    if kind == "bundled" and colon:
        return _bundled(spec, name)
    if kind == "synthetic" and colon:
        return _synthetic(spec, name)
    folder = Path(os.path.expanduser(spec))
    if spec and os.path.isdir(folder):  # False too where it may not even be looked at
        return _in_folder(spec, folder.resolve().name, folder)
    if _looks_like_path(spec):
        raise ModelError(f"model {spec!r}: no such folder")
    return _in_folder(spec, spec, fetch(spec, hub or HubConfig()))


def _looks_like_path(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or spec.count("/") > 1 or not spec


def _bundled(spec: str, name: str) -> ModelSource:
    if name not in BUNDLED:
        raise ModelError(f"model {spec!r}: no such bundled model; known: {', '.join(BUNDLED)}")
    with as_file(files("serve") / "data" / name) as folder:
        return _in_folder(spec, name, folder)


def _synthetic(spec: str, name: str) -> ModelSource:
    if name not in SIZES:
        raise ModelError(f"model {spec!r}: no such size; known: {', '.join(SIZES)}")
    config = SIZES[name]
    return ModelSource(
        spec, f"synthetic-{name}", config, lambda: SyntheticWeights(config), is_noise=True
    )


def _in_folder(spec: str, name: str, folder: Path) -> ModelSource:
    config = read_config(folder)
    return ModelSource(spec, name, config, lambda: Checkpoint(folder, config), folder)
