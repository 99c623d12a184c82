"""GPT-2 in TVM's Relax `nn`, over TVM's paged KV cache or KV pages of our own.

Knows nothing of schedules or of the engine.

Linear weights are (out, in), the transpose of Hugging Face's Conv1D: each output is then a dot
product of two contiguous rows, which is the form DLight's Matmul and GEMV rules recognise. Where a
library asks for it, they are packed in panels (serve/model/layers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache
from tvm.target import Target

from serve.model import kv_pages
from serve.model.config import GPT2Config
from serve.model.kv_pages import KVPages
from serve.model.layers import Embedding, Linear, matmul, pack
from serve.model.parameters import parameter_shapes

KVArgument: TypeAlias = PagedKVCache | Sequence[Tensor]  # TVM's cache, or the tensors of KVPages

_ACTIVATIONS = {
    "gelu_new": lambda x: op.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: op.gelu(x, approximate="tanh"),
    "gelu": op.gelu,
    "relu": op.relu,
    "silu": op.silu,
    "tanh": op.tanh,
}


class Attention(nn.Module):  # type: ignore[misc]
    def __init__(self, config: GPT2Config, layer: int, panel: int | None) -> None:
        self.num_heads, self.head_dim = config.n_head, config.head_dim
        self.layer, self.sm_scale = layer, config.sm_scale(layer)
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, panel)
        self.c_proj = Linear(config.n_embd, config.n_embd, panel)

    def forward(self, x: Tensor, kv_cache: PagedKVCache | KVPages) -> Tensor:
        batch, length, width = x.shape
        qkv = op.reshape(self.c_attn(x), (batch, length, 3 * self.num_heads, self.head_dim))
        out = kv_cache.attention_with_fused_qkv(self.layer, qkv, self.num_heads, self.sm_scale)
        return self.c_proj(op.reshape(out, (batch, length, width)))


class MLP(nn.Module):  # type: ignore[misc]
    def __init__(self, config: GPT2Config, panel: int | None) -> None:
        self.c_fc = Linear(config.n_embd, config.n_inner, panel)
        self.c_proj = Linear(config.n_inner, config.n_embd, panel)
        self.activation = _ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, config: GPT2Config, layer: int, panel: int | None) -> None:
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer, panel)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, panel)

    def forward(self, x: Tensor, kv_cache: PagedKVCache | KVPages) -> Tensor:
        x = x + self.attn(self.ln_1(x), kv_cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):  # type: ignore[misc]
    def __init__(self, config: GPT2Config, panel: int | None) -> None:
        self.wte = Embedding(config.vocab_size, config.n_embd, panel)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer, panel) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, kv_cache: KVArgument) -> Tensor:
        """(batch, length) int32 -> (batch, length, n_embd).

        Each token's position comes from the cache.
        """
        if not isinstance(kv_cache, PagedKVCache):
            kv_cache = KVPages(*kv_cache)
        batch, length = input_ids.shape
        positions = kv_cache.get_query_positions(batch * length)
        x = self.wte(op.reshape(input_ids, (batch * length,))) + self.wpe(positions)
        x = op.reshape(x, (batch, length, self.wpe.width))
        for block in self.h:
            x = block(x, kv_cache)
        return self.ln_f(x)


class GPT2LMHeadModel(nn.Module):  # type: ignore[misc]
    """The functions of a library; logits are float32.

    batch_prefill   (1, total) ids, (batch,) last positions -> (1, batch, vocab)
    decode          (1, 1) ids                              -> (1, 1, vocab)
    batch_decode    (batch, 1) ids                          -> (batch, 1, vocab)
    batch_verify    (1, total) ids                          -> (1, total, vocab)

    pack            (out, in) weight                        -> [ceil(out / panel), in, panel]

    `total` is the summed length of the packed sequences; the KV cache knows which is which. `pack`
    is there if `panel` is: the matrices are then taken packed.
    """

    def __init__(self, config: GPT2Config, panel: int | None = None) -> None:
        self.config, self.panel = config, panel
        self.transformer = Transformer(config, panel)
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.n_embd, panel)

    def _logits(self, hidden: Tensor) -> Tensor:
        tied = self.config.tie_word_embeddings
        head = self.transformer.wte if tied else self.lm_head
        return matmul(hidden, head.weight, self.config.vocab_size)

    def pack(self, weight: Tensor) -> Tensor:
        assert self.panel is not None
        return pack(weight, self.panel)

    def batch_prefill(
        self, input_ids: Tensor, logit_positions: Tensor, kv_cache: KVArgument
    ) -> Tensor:
        hidden = self.transformer(input_ids, kv_cache)
        return self._logits(op.take(hidden, logit_positions, axis=1))

    def decode(self, input_ids: Tensor, kv_cache: KVArgument) -> Tensor:
        return self._logits(self.transformer(input_ids, kv_cache))

    def batch_decode(self, input_ids: Tensor, kv_cache: KVArgument) -> Tensor:
        return self._logits(self.transformer(input_ids, kv_cache))

    def batch_verify(self, input_ids: Tensor, kv_cache: KVArgument) -> Tensor:
        return self._logits(self.transformer(input_ids, kv_cache))

    def create_kv_pages(self, num_pages: tirx.Var) -> tuple[Tensor, Tensor]:
        return kv_pages.empty_pages(self.config, num_pages)

    def create_paged_kv_cache(
        self,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        page_size: tirx.Var,
        support_sliding_window: tirx.Var,
    ) -> PagedKVCache:
        config = self.config
        return TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            layer_partition=relax.ShapeExpr([0, config.n_layer]),
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_head,
            qk_head_dim=config.head_dim,
            v_head_dim=config.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NONE,
            rope_scale=1,
            rope_theta=10000,
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=config.head_dim,
            enable_disaggregation=False,
            dtype="float32",
            target=Target.current(),
        )


def export(
    config: GPT2Config, panel: int | None = None, kv_cache: str = "tvm"
) -> tuple[Any, list[tuple[str, tuple[int, ...]]], list[str]]:
    """The model's Relax IRModule, its parameters, and the names of those that it takes packed.

    Parameters are (name, shape as loaded) in calling order.

    Needs a current Target. `panel`: the library takes its matrices packed in panels of that many
    rows, as its own function `pack` packs them. `kv_cache`: "tvm" or "pages", whose tensors
    `create_kv_pages` makes.
    """
    has_pages = kv_cache == "pages"

    def cache(tokens: str | int) -> Any:
        tvms = nn.spec.Object(object_type=PagedKVCache)
        return kv_pages.spec(config, tokens) if has_pages else tvms

    plain = {"$": {"param_mode": "packed", "effect_mode": "none"}}
    spec = {
        "batch_prefill": {
            "input_ids": nn.spec.Tensor([1, "total"], "int32"),
            "logit_positions": nn.spec.Tensor(["batch"], "int32"),
            "kv_cache": cache("total"),
            **plain,
        },
        "decode": {"input_ids": nn.spec.Tensor([1, 1], "int32"), "kv_cache": cache(1), **plain},
        "batch_decode": {
            "input_ids": nn.spec.Tensor(["batch", 1], "int32"),
            "kv_cache": cache("batch"),
            **plain,
        },
        "batch_verify": {
            "input_ids": nn.spec.Tensor([1, "total"], "int32"),
            "kv_cache": cache("total"),
            **plain,
        },
    }
    none = {"$": {"param_mode": "none", "effect_mode": "none"}}
    if has_pages:
        spec["create_kv_pages"] = {"num_pages": int, **none}
    else:
        spec["create_paged_kv_cache"] = {
            "max_batch_size": int,
            "max_total_seq_len": int,
            "prefill_chunk_size": int,
            "page_size": int,
            "support_sliding_window": int,
            **none,
        }
    if panel is not None:
        spec["pack"] = {"weight": nn.spec.Tensor(["rows", "columns"], "float32"), **none}
    mod, params = GPT2LMHeadModel(config, panel).export_tvm(spec=spec)
    shapes = parameter_shapes(config)
    packed = [name for name, param in params if param.ndim > len(shapes[name])]
    return mod, [(name, shapes[name]) for name, _ in params], packed
