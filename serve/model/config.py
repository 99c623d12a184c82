"""GPT-2's hyperparameters, read from a Hugging Face config.json.

Knows nothing of TVM or of weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.errors import ModelError

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "tanh")
# Keys of config.json that change the function the model computes and that we cannot honour.
REFUSED = {"add_cross_attention": False, "quantization_config": None, "pruned_heads": None}
# What transformers reads GPT-2's keys by as well.
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


@dataclass(frozen=True)
class GPT2Config:
    """What determines the compiled program and the shapes of its weights.

    `scale_attn_weights`: divide attention scores by sqrt(head_dim).
    `scale_attn_by_inverse_layer_idx`: divide them by (layer + 1) too. `reorder_and_upcast_attn`
    (Mistral's training stability option) computes scores in f32 and scales before the product; our
    attention always accumulates in f32, so it changes nothing here and is accepted.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def sm_scale(self, layer: int) -> float:
        """The factor on attention scores in this layer."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def num_parameters(self) -> int:
        block = self.n_embd * (4 * self.n_embd + 2 * self.n_inner + 9) + self.n_inner
        embeddings = (self.vocab_size + self.n_positions) * self.n_embd
        head = 0 if self.tie_word_embeddings else self.vocab_size * self.n_embd
        return embeddings + self.n_layer * block + 2 * self.n_embd + head

    def kv_bytes_per_token(self, itemsize: int = 4) -> int:
        return 2 * self.n_layer * self.n_embd * itemsize

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


SIZES = {
    "distilgpt2": GPT2Config(n_layer=6),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024, n_inner=4096),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280, n_inner=5120),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600, n_inner=6400),
}


def read_config(folder: Path) -> GPT2Config:
    """Read `folder/config.json`.

    Raises ModelError naming the file and the key when it is missing, malformed, not GPT-2's, or
    asks for something that this server would otherwise silently leave out.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: not found; a model folder needs a config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], source: str) -> GPT2Config:
    """Check the values of a Hugging Face GPT-2 config; `source` is named in the errors."""
    if raw.get("model_type") != "gpt2":
        raise ModelError(
            f"{source}: model_type is {raw.get('model_type')!r}; only 'gpt2' can be served"
        )
    raw = _by_own_names(raw, source)
    for key, neutral in REFUSED.items():
        if raw.get(key) not in (neutral, None, {}, False):
            raise ModelError(f"{source}: {key} = {raw[key]!r} is not supported")
    sizes = {
        key: _positive_int(raw, key, default, source)
        for key, default in (
            ("vocab_size", 50257),
            ("n_positions", raw.get("n_ctx", 1024)),
            ("n_embd", 768),
            ("n_layer", 12),
            ("n_head", 12),
        )
    }
    n_inner = (
        4 * sizes["n_embd"]
        if raw.get("n_inner") is None
        else _positive_int(raw, "n_inner", 0, source)
    )
    if sizes["n_embd"] % sizes["n_head"]:
        raise ModelError(
            f"{source}: n_embd = {sizes['n_embd']} is not a multiple of n_head = {sizes['n_head']}"
        )
    return GPT2Config(
        **sizes,
        n_inner=n_inner,
        activation_function=_activation(raw, source),
        layer_norm_epsilon=_positive_float(raw, "layer_norm_epsilon", 1e-5, source),
        scale_attn_weights=_flag(raw, "scale_attn_weights", True, source),
        scale_attn_by_inverse_layer_idx=_flag(
            raw, "scale_attn_by_inverse_layer_idx", False, source
        ),
        reorder_and_upcast_attn=_flag(raw, "reorder_and_upcast_attn", False, source),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", True, source),
    )


def _by_own_names(raw: dict[str, Any], source: str) -> dict[str, Any]:
    own = dict(raw)
    for alias, key in ALIASES.items():
        if alias in own and own.setdefault(key, own[alias]) != own[alias]:
            raise ModelError(f"{source}: {key} = {own[key]!r}, but {alias} = {own[alias]!r}")
    return own


def _positive_int(raw: dict[str, Any], key: str, default: int, source: str) -> int:
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{source}: {key} = {value!r}: expected a positive integer")
    return value


def _positive_float(raw: dict[str, Any], key: str, default: float, source: str) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"{source}: {key} = {value!r}: expected a positive number")
    return float(value)


def _flag(raw: dict[str, Any], key: str, default: bool, source: str) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"{source}: {key} = {value!r}: expected true or false")
    return value


def _activation(raw: dict[str, Any], source: str) -> str:
    value = raw.get("activation_function", "gelu_new")
    if value not in ACTIVATIONS:
        raise ModelError(
            f"{source}: activation_function = {value!r}: expected one of {', '.join(ACTIVATIONS)}"
        )
    return str(value)
