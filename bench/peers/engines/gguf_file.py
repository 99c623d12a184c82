"""A GGUF file of a Hugging Face GPT-2 folder, in f32, by the `gguf` package alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NORMAL, CONTROL = 1, 3  # kinds of tokens
LAYER_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def write(folder: Path, file: Path) -> None:
    """What llama.cpp's own converter writes for this folder: same tensors, same keys."""
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text("utf-8"))
    writer: Any = gguf.GGUFWriter(file, "gpt2")
    writer.add_name(folder.name)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, folder, config["eos_token_id"])
    with safe_open(folder / "model.safetensors", "numpy") as weights:
        for name in sorted(weights.keys()):
            array = weights.get_tensor(name)
            writer.add_tensor(gguf_name(name), array.T.copy() if is_conv1d(name) else array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Of what Hugging Face calls `name`: transformer.h.0.ln_1.bias is blk.0.attn_norm.bias."""
    stem, _, kind = name.removeprefix("transformer.").rpartition(".")
    if not stem.startswith("h."):
        return f"{NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{LAYER_NAMES[part]}.{kind}"


def is_conv1d(name: str) -> bool:
    """Whether Hugging Face stores this one as (in, out)."""
    return name.endswith(".weight") and ".c_" in name


def _add_tokenizer(writer: Any, folder: Path, end: int) -> None:
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = (folder / "merges.txt").read_text("utf-8").rstrip("\n").split("\n")
    tokens = sorted(vocab, key=vocab.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if vocab[token] == end else NORMAL for token in tokens])
    writer.add_token_merges([merge for merge in merges if not merge.startswith("#version")])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
