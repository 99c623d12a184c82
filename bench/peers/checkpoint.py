"""The weights that all engines share: a Hugging Face folder of random weights, written once."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from bench.peers.kept import once
from serve.model.config import SIZES, GPT2Config
from serve.model.parameters import is_conv1d
from serve.model.synthetic import SyntheticWeights
from serve.tokenizer import END_OF_TEXT

# tiny: to try the benchmark itself. Heads of 64, since vLLM has no kernel for very small ones.
SHAPES = SIZES | {"tiny": GPT2Config(n_layer=2, n_embd=128, n_head=2, n_inner=512)}


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of the weights of `synthetic:NAME`: config.json, model.safetensors, tokenizer."""
    return once(cache / f"synthetic-{name}", lambda folder: write(SHAPES[name], folder))


def write(config: GPT2Config, folder: Path) -> None:
    """config.json, model.safetensors in f32 and GPT-2's tokenizer files into a new folder."""
    folder.mkdir(parents=True)
    weights = SyntheticWeights(config)
    tensors = {
        name: np.ascontiguousarray(array.T) if is_conv1d(name) else array
        for name, array in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(config))
    _write_tokenizer(folder)


def _config(config: GPT2Config) -> dict[str, Any]:
    end = config.vocab_size - 1
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": end,
        "eos_token_id": end,
        "n_ctx": config.n_positions,
        **config.as_dict(),
    }


def _write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt from our vocab.bpe, tokenizer.json of both, and their settings."""
    merges = (files("serve") / "data" / "gpt2" / "vocab.bpe").read_text(encoding="utf-8")
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    tokens = [*_byte_symbols(), *(line.replace(" ", "") for line in lines), END_OF_TEXT]
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, **special}
    _write_json(folder / "tokenizer_config.json", settings)


def _byte_symbols() -> list[str]:
    """GPT-2's first 256 tokens: printable bytes as they are, then the others as U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
