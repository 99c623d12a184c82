"""The names and shapes of GPT-2's weights, as our program takes them. Knows no files and no TVM.

Names are Hugging Face's. Linear weights are (out, in): the transpose of its Conv1D.
"""

from __future__ import annotations

from serve.model.config import GPT2Config

Shape = tuple[int, ...]
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def parameter_shapes(config: GPT2Config) -> dict[str, Shape]:
    """Every parameter of the model, (out, in) for matrices."""
    width, inner = config.n_embd, config.n_inner
    shapes: dict[str, Shape] = {
        "transformer.wte.weight": (config.vocab_size, width),
        "transformer.wpe.weight": (config.n_positions, width),
    }
    for layer in range(config.n_layer):
        block = {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (3 * width, width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (inner, width),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (width, inner),
            "mlp.c_proj.bias": (width,),
        }
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"transformer.ln_f.weight": (width,), "transformer.ln_f.bias": (width,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def is_conv1d(name: str) -> bool:
    """Whether Hugging Face stores this one as (in, out)."""
    return name.endswith(CONV1D)
