"""The folder of weights that all engines read, and what llama.cpp calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.peers.checkpoint import SHAPES, checkpoint
from bench.peers.engines.gguf_file import gguf_name, is_conv1d
from bench.peers.kept import once
from serve.model import parameters
from serve.model.source import find_model
from serve.model.synthetic import SyntheticWeights
from serve.tokenizer import Tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("tiny", tmp_path_factory.mktemp("cache"))


def test_it_holds_the_synthetic_weights(folder: Path) -> None:
    found = find_model(str(folder))
    assert found.config == SHAPES["tiny"]
    own, weights = SyntheticWeights(SHAPES["tiny"]), found.load()
    assert own.keys() == weights.keys()
    for name in own:
        np.testing.assert_array_equal(weights[name], own[name])


def test_it_has_gpt2s_tokenizer_in_both_forms(folder: Path, tmp_path: Path) -> None:
    text = "Four score and seven years ago ## naïve \u2014 <|endoftext|>"
    expected = Tokenizer.bundled()
    assert Tokenizer.from_folder(folder).encode(text) == expected.encode(text)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    by_vocab = Tokenizer.from_folder(tmp_path)
    assert by_vocab.encode(text) == expected.encode(text)
    assert by_vocab.vocab_size == expected.vocab_size == 50257


def test_it_is_written_once(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoint("tiny", folder.parent) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_what_was_left_half_made_is_made_again(tmp_path: Path) -> None:
    target = tmp_path / "kept"

    def fail(path: Path) -> None:
        path.mkdir()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        once(target, fail)
    assert not target.exists()
    once(target, Path.mkdir)
    assert target.is_dir()
    once(target, fail)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.wte.weight", "token_embd.weight"),
        ("transformer.wpe.weight", "position_embd.weight"),
        ("transformer.h.11.attn.c_attn.bias", "blk.11.attn_qkv.bias"),
        ("transformer.h.0.mlp.c_proj.weight", "blk.0.ffn_down.weight"),
        ("transformer.ln_f.bias", "output_norm.bias"),
    ],
)
def test_names_of_gguf(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


def test_the_same_matrices_are_transposed() -> None:
    names = parameters.parameter_shapes(SHAPES["tiny"])
    assert all(is_conv1d(name) == parameters.is_conv1d(name) for name in names)
    assert len({gguf_name(name) for name in names}) == len(names)
