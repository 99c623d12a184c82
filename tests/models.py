"""Toy GPT-2 models as Hugging Face folders, from numpy and a seed alone.

Their logits are O(1-10), so that the likeliest token is so by a margin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[np.float32]]

DTYPES: dict[str, DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# Of a matrix's entries, times the square root of its inputs: N(0, 0.3) where there are 64.
SCALE = 2.4


def write_model(
    folder: Path,
    *,
    vocab_size: int = 1000,
    n_positions: int = 128,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_inner: int | None = None,
    tied: bool = True,
    dtype: str = "float32",
    num_shards: int = 1,
    prefix: str = "transformer.",
    masks: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write config.json and the weights into `folder`, which is made and returned.

    tied: no lm_head.weight. prefix: "" writes the names of a base model. masks: the causal masks
    that old checkpoints carry along. config: further keys of config.json.
    """
    raw = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size,
        "n_positions": n_positions,
        "n_embd": n_embd,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_inner": n_inner,
        "tie_word_embeddings": tied,
        "bos_token_id": vocab_size - 1,
        "eos_token_id": vocab_size - 1,
        "dtype": dtype,
        **config,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2), encoding="utf-8")
    tensors = make_tensors(raw, seed)
    if masks:
        tensors |= _masks(n_layer, n_positions)
    named = {name.replace("transformer.", prefix, 1): array for name, array in tensors.items()}
    write_tensors(folder, named, dtype, num_shards)
    return folder


def make_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """The weights by Hugging Face's names and in its layout: Conv1D matrices are (in, out)."""
    rng = np.random.default_rng(seed)
    width = config["n_embd"]
    inner = config["n_inner"] or 4 * width

    def normal(*shape: int, scale: float = 0.1, mean: float = 0.0) -> NDArray[np.float32]:
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    def matrix(num_in: int, num_out: int) -> NDArray[np.float32]:
        return normal(num_in, num_out, scale=SCALE * num_in**-0.5)

    embedding = SCALE * width**-0.5
    tensors = {
        "transformer.wte.weight": normal(config["vocab_size"], width, scale=embedding),
        "transformer.wpe.weight": normal(config["n_positions"], width, scale=embedding),
    }
    for layer in range(config["n_layer"]):
        block = {
            "ln_1.weight": normal(width, mean=1.0),
            "ln_1.bias": normal(width),
            "attn.c_attn.weight": matrix(width, 3 * width),
            "attn.c_attn.bias": normal(3 * width),
            "attn.c_proj.weight": matrix(width, width),
            "attn.c_proj.bias": normal(width),
            "ln_2.weight": normal(width, mean=1.0),
            "ln_2.bias": normal(width),
            "mlp.c_fc.weight": matrix(width, inner),
            "mlp.c_fc.bias": normal(inner),
            "mlp.c_proj.weight": matrix(inner, width),
            "mlp.c_proj.bias": normal(width),
        }
        tensors |= {f"transformer.h.{layer}.{name}": array for name, array in block.items()}
    tensors["transformer.ln_f.weight"] = normal(width, mean=1.0)
    tensors["transformer.ln_f.bias"] = normal(width)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(config["vocab_size"], width, scale=embedding)
    return tensors


def write_tensors(
    folder: Path,
    tensors: Mapping[str, NDArray[Any]],
    dtype: str = "float32",
    num_shards: int = 1,
) -> None:
    """One model.safetensors, or shards and their index as transformers names them."""
    stored = {name: np.asarray(array, DTYPES[dtype]) for name, array in tensors.items()}
    if num_shards == 1:
        _save(folder / "model.safetensors", stored)
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        names = list(stored)[shard::num_shards]
        _save(folder / file, {name: stored[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in stored.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _save(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    # "format": transformers reads no file without it.
    save_file(dict(tensors), path, metadata={"format": "pt"})


def _masks(n_layer: int, n_positions: int) -> Tensors:
    causal = np.tril(np.ones((1, 1, n_positions, n_positions), np.float32))
    masks: Tensors = {}
    for layer in range(n_layer):
        masks[f"transformer.h.{layer}.attn.bias"] = causal
        masks[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return masks
