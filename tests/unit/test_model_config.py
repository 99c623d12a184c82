"""Every key of config.json that counts, and every wrong value, named in the error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from serve.errors import ModelError
from serve.model.config import ACTIVATIONS, ALIASES, SIZES, GPT2Config, parse_config, read_config
from serve.model.parameters import is_conv1d, parameter_shapes

pytestmark = pytest.mark.unit

SOURCE = "somewhere/config.json"


def parse(**raw: Any) -> GPT2Config:
    return parse_config({"model_type": "gpt2", **raw}, SOURCE)


def test_the_defaults_are_transformers_own() -> None:
    assert parse() == GPT2Config() == SIZES["gpt2"]


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width", "parameters"),
    [
        # The published sizes, as transformers counts them: the tied head once.
        ("distilgpt2", 6, 12, 768, 81_912_576),
        ("gpt2", 12, 12, 768, 124_439_808),
        ("gpt2-medium", 24, 16, 1024, 354_823_168),
        ("gpt2-large", 36, 20, 1280, 774_030_080),
        ("gpt2-xl", 48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_published_sizes(
    name: str, layers: int, heads: int, width: int, parameters: int
) -> None:
    config = parse(n_layer=layers, n_head=heads, n_embd=width)
    assert config == SIZES[name]
    assert config.num_parameters == parameters
    assert config.head_dim == 64
    assert config.n_inner == 4 * width
    assert config.kv_bytes_per_token() == 2 * layers * width * 4
    assert config.kv_bytes_per_token(itemsize=2) == 2 * layers * width * 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_inner", [None, 100])
def test_parameters_are_counted_as_they_are_listed(tied: bool, n_inner: int | None) -> None:
    config = parse(
        vocab_size=11, n_positions=7, n_embd=6, n_layer=3, n_head=2, n_inner=n_inner,
        tie_word_embeddings=tied,
    )  # fmt: skip
    shapes = parameter_shapes(config)
    assert config.num_parameters == sum(math.prod(shape) for shape in shapes.values())
    assert ("lm_head.weight" in shapes) is not tied
    assert all(len(shape) == 2 for name, shape in shapes.items() if is_conv1d(name))
    assert sum(is_conv1d(name) for name in shapes) == 4 * 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 1000),
        ("n_positions", 77),
        ("n_embd", 120),
        ("n_layer", 3),
        ("n_head", 6),
        ("n_inner", 500),
        ("layer_norm_epsilon", 1e-6),
        ("layer_norm_epsilon", 1),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("tie_word_embeddings", False),
        *(("activation_function", name) for name in ACTIVATIONS),
    ],
)
def test_every_key_is_honoured(key: str, value: Any) -> None:
    config = parse(**{key: value})
    assert getattr(config, key) == value
    assert config.as_dict()[key] == value
    assert GPT2Config(**config.as_dict()) == config  # as the manifest restores it


@pytest.mark.parametrize(("alias", "key"), ALIASES.items())
def test_transformers_other_names(alias: str, key: str) -> None:
    assert getattr(parse(**{alias: 24}), key) == 24
    assert getattr(parse(**{alias: 24, key: 24}), key) == 24
    with pytest.raises(ModelError, match=rf"{SOURCE}: {key} = 12, but {alias} = 24"):
        parse(**{alias: 24, key: 12})


def test_n_ctx_stands_in_for_n_positions() -> None:
    assert parse(n_ctx=64).n_positions == 64
    assert parse(n_ctx=64, n_positions=32).n_positions == 32


@pytest.mark.parametrize(
    ("scale", "by_layer", "expected"),
    [
        (True, False, [0.25, 0.25, 0.25]),
        (False, False, [1.0, 1.0, 1.0]),
        (True, True, [0.25, 0.125, 0.25 / 3]),
        (False, True, [1.0, 0.5, 1 / 3]),
    ],
)
def test_the_factor_on_attention_scores(scale: bool, by_layer: bool, expected: list[float]) -> None:
    config = parse(
        n_embd=64, n_head=4, scale_attn_weights=scale, scale_attn_by_inverse_layer_idx=by_layer
    )
    assert [config.sm_scale(layer) for layer in range(3)] == expected


@pytest.mark.parametrize(
    "key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5, 12.0, "12", True, [12], {}, math.nan])
def test_sizes_are_positive_integers(key: str, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        parse(**{key: value})
    assert str(caught.value) == f"{SOURCE}: {key} = {value!r}: expected a positive integer"


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"])
def test_only_n_inner_may_be_null(key: str) -> None:
    assert parse(n_inner=None).n_inner == 4 * 768
    with pytest.raises(ModelError, match=f"{key} = None: expected a positive integer"):
        parse(**{key: None})


@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", True, None, [], math.nan, math.inf])
def test_epsilon_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        parse(layer_norm_epsilon=value)
    expected = f"{SOURCE}: layer_norm_epsilon = {value!r}: expected a positive number"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "key",
    [
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn",
        "tie_word_embeddings",
    ],
)
@pytest.mark.parametrize("value", [0, 1, "true", None, []])
def test_flags_are_booleans(key: str, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        parse(**{key: value})
    assert str(caught.value) == f"{SOURCE}: {key} = {value!r}: expected true or false"


@pytest.mark.parametrize("value", ["quick_gelu", "GELU", "", None, 1, ["gelu"]])
def test_an_unknown_activation_names_the_known(value: Any) -> None:
    with pytest.raises(ModelError, match=r"activation_function = .*one of gelu_new, gelu_py"):
        parse(activation_function=value)


def test_heads_divide_the_width() -> None:
    with pytest.raises(ModelError, match=r"n_embd = 768 is not a multiple of n_head = 11"):
        parse(n_head=11)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("add_cross_attention", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("pruned_heads", {"0": [1, 2]}),
    ],
)
def test_what_we_cannot_honour_is_refused(key: str, value: Any) -> None:
    neutral: Any
    for neutral in (None, {}, False):
        assert parse(**{key: neutral}) == GPT2Config()
    with pytest.raises(ModelError) as caught:
        parse(**{key: value})
    assert str(caught.value) == f"{SOURCE}: {key} = {value!r} is not supported"


@pytest.mark.parametrize("value", ["llama", "GPT2", "gpt_neo", None, 2])
def test_another_model_type(value: Any) -> None:
    with pytest.raises(ModelError, match=rf"model_type is {value!r}; only 'gpt2' can be served"):
        parse(model_type=value)


def test_no_model_type() -> None:
    with pytest.raises(ModelError, match=r"model_type is None"):
        parse_config({}, SOURCE)


def test_keys_without_a_say_in_inference_are_ignored() -> None:
    config = parse(
        attn_pdrop=0.1, summary_type="cls_index", use_cache=True, dtype="float16",
        architectures=["GPT2LMHeadModel"], task_specific_params={"text-generation": {}},
    )  # fmt: skip
    assert config == GPT2Config()


def test_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    assert read_config(tmp_path) == GPT2Config(n_layer=2)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": "2"}))
    with pytest.raises(ModelError, match=rf"^{tmp_path}/config\.json: n_layer = '2': expected"):
        read_config(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^{tmp_path}/config\.json: not found"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b'{"a": 1}}', b"nope", b"\x00", b"[" * 100_000],
    ids=range(7),
)
def test_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{tmp_path}/config\.json: not readable as JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize(("content", "kind"), [("[]", "list"), ("1", "int"), ("null", "NoneType")])
def test_not_an_object(tmp_path: Path, content: str, kind: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"expected a JSON object, found {kind}"):
        read_config(tmp_path)


def test_config_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json: not readable as JSON"):
        read_config(tmp_path)
