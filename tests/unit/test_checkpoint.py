"""Weights from a folder: every form they come in, and every way they can be wrong."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from serve.errors import ModelError, WeightsError
from serve.model.checkpoint import Checkpoint
from serve.model.config import GPT2Config, read_config
from serve.model.parameters import is_conv1d, parameter_shapes
from tests.models import DTYPES, make_tensors, write_model

pytestmark = pytest.mark.unit

SIZES: dict[str, Any] = {
    "vocab_size": 40, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20,
}  # fmt: skip
SHAPES = parameter_shapes(GPT2Config(**SIZES))
C_ATTN = "transformer.h.1.attn.c_attn.weight"


def open_model(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_config(folder))


def stored(folder: Path) -> dict[str, NDArray[Any]]:
    return dict(load_file(folder / "model.safetensors"))


def store(folder: Path, tensors: dict[str, NDArray[Any]]) -> None:
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", **SIZES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("masks", [True, False])
def test_every_form(
    tmp_path: Path, dtype: str, tied: bool, num_shards: int, prefix: str, masks: bool
) -> None:
    options: dict[str, Any] = {"tied": tied, "num_shards": num_shards, "prefix": prefix}
    write_model(tmp_path, **SIZES, dtype=dtype, masks=masks, **options)
    config = read_config(tmp_path)
    weights = Checkpoint(tmp_path, config)
    written = make_tensors(SIZES | {"tie_word_embeddings": tied})
    assert {name: array.shape for name, array in weights.items()} == parameter_shapes(config)
    assert len(weights) == len(written)
    for name, array in weights.items():
        expected = written[name].astype(DTYPES[dtype]).astype(np.float32)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected.T if is_conv1d(name) else expected)


def test_bf16_bits_are_kept(folder: Path) -> None:
    tensors = stored(folder)
    values = np.array([1, -2.5, 3.0e38, 1.0e-38, 0.1, 0, -0.0, 65536, 257, 2, 3, 4], np.float32)
    tensors["transformer.ln_f.bias"] = values.astype(ml_dtypes.bfloat16)
    store(folder, tensors)
    kept = open_model(folder)["transformer.ln_f.bias"]
    assert kept.tobytes() == values.astype(ml_dtypes.bfloat16).astype(np.float32).tobytes()


def test_one_file_may_mix_dtypes(folder: Path) -> None:
    tensors = stored(folder)
    for index, name in enumerate(tensors):
        tensors[name] = tensors[name].astype(list(DTYPES.values())[index % 3])
    store(folder, tensors)
    assert all(array.dtype == np.float32 for array in open_model(folder).values())


def test_a_tied_model_ignores_a_stored_head(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store(folder, stored(folder) | {"lm_head.weight": np.zeros((40, 12), np.float32)})
    assert "lm_head.weight" not in open_model(folder)
    assert caplog.text == ""


def test_a_tensor_without_a_use_is_mentioned(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = stored(folder) | {"score.weight": np.zeros(3, np.float32)}
    store(folder, tensors | {"transformer.h.2.ln_1.weight": np.zeros(12, np.float32)})
    with caplog.at_level(logging.WARNING):
        open_model(folder)
    assert "no use for: score.weight, transformer.h.2.ln_1.weight" in caplog.text


def test_one_file_wins_over_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("garbage")
    assert open_model(folder)


def test_not_a_parameter(folder: Path) -> None:
    with pytest.raises(KeyError):
        open_model(folder)["transformer.h.9.ln_1.weight"]


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    tensors = stored(folder)
    expected = list(tensors.pop(name).shape)
    store(folder, tensors)
    with pytest.raises(WeightsError) as caught:
        open_model(folder)
    assert str(caught.value) == (
        f"{folder}: tensor {name!r}: expected shape {expected}, found no such tensor"
    )


def test_an_untied_model_without_its_head(tmp_path: Path) -> None:
    write_model(tmp_path, **SIZES, tied=False)
    tensors = stored(tmp_path)
    del tensors["lm_head.weight"]
    store(tmp_path, tensors)
    with pytest.raises(
        WeightsError, match=r"'lm_head.weight': expected shape \[40, 12\], found no"
    ):
        open_model(tmp_path)


@pytest.mark.parametrize("name", SHAPES)
def test_a_mis_shaped_tensor(folder: Path, name: str) -> None:
    tensors = stored(folder)
    right = tensors[name]
    for wrong in (right[1:], right[..., None], right[None], right[:0], np.float32(1)):
        store(folder, tensors | {name: np.ascontiguousarray(wrong).reshape(np.shape(wrong))})
        with pytest.raises(WeightsError) as caught:
            open_model(folder)
        assert str(caught.value) == (
            f"{folder}/model.safetensors: tensor {name!r}: "
            f"expected shape {list(right.shape)}, found shape {list(np.shape(wrong))}"
        )


@pytest.mark.parametrize("name", [name for name in SHAPES if is_conv1d(name)])
def test_a_matrix_the_wrong_way_round(folder: Path, name: str) -> None:
    """(out, in), as torch's Linear has it. (A square one, such as attn.c_proj, cannot be told.)"""
    tensors = stored(folder)
    rows, columns = tensors[name].shape
    store(folder, tensors | {name: np.ascontiguousarray(tensors[name].T)})
    if rows == columns:
        assert open_model(folder)
        return
    with pytest.raises(WeightsError) as caught:
        open_model(folder)
    assert caught.value.expected == f"shape [{rows}, {columns}]"  # (in, out), as it is stored
    assert caught.value.found == f"shape [{columns}, {rows}]"


@pytest.mark.parametrize("dtype", ["float64", "int8", "int32", "bool", "float8_e4m3fn"])
def test_a_dtype_that_is_no_weight(folder: Path, dtype: str) -> None:
    name = "transformer.ln_f.weight"
    tensors = stored(folder)
    store(folder, tensors | {name: tensors[name].astype(np.dtype(dtype))})
    with pytest.raises(WeightsError, match=rf"'{name}': expected F32 or F16 or BF16, found ") as e:
        open_model(folder)
    assert e.value.found in ("F64", "I8", "I32", "BOOL", "F8_E4M3")


def test_a_truncated_file_names_the_tensor_and_its_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header.pop("__metadata__")
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        for kept in (0, 1, (end - begin) // 2, end - begin - 1):
            path.write_bytes(whole[: 8 + length + begin + kept])
            with pytest.raises(WeightsError) as caught:
                open_model(folder)
            error = caught.value
            assert error.source == f"{path}: truncated"
            if error.tensor == name:  # else one of those behind it, which are cut off too
                assert error.expected == f"shape {entry['shape']} in {end - begin} bytes"
                assert error.found == f"{kept} bytes"
            else:
                assert header[error.tensor]["data_offsets"][0] >= end
                assert error.found == "0 bytes"


def test_truncated_anywhere(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    cuts = [*range(64), *range(64, len(whole), 61), 8 + length - 1, 8 + length, len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        kind = ModelError if cut < 8 + length else WeightsError
        with pytest.raises(kind, match=str(path)):
            open_model(folder)


def test_damaged_header(folder: Path) -> None:
    """Never anything but our own errors, whichever byte of the header is not what it was."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    random_ = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        damaged[random_.randrange(8 + length)] = random_.randrange(256)
        path.write_bytes(damaged)
        try:
            for array in open_model(folder).values():
                assert array.dtype == np.float32
        except (ModelError, WeightsError) as error:
            assert str(folder) in str(error)  # noqa: PT017


HEADERS: list[Any] = [
    [],
    1,
    None,
    "text",
    {"a": 1},
    {"a": {}},
    {"a": {"dtype": "F32", "shape": [1]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": None}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}},
    {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}},
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}},
    {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": 7},
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_none(folder: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ModelError, match=rf"^{path}: not a safetensors file"):
        open_model(folder)


GARBAGE = [b"", b"\0", bytes(8), bytes(9), b"\xff" * 64, b"<!DOCTYPE html><html>Not found</html>"]
DEEP = b"[" * 100_000
GARBAGE += [len(DEEP).to_bytes(8, "little") + DEEP]
GARBAGE += [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage(folder: Path, content: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"^{path}: not a safetensors file"):
        open_model(folder)


def test_bytes_after_the_last_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelError, match=rf"^{path}: not a safetensors file"):
        open_model(folder)


def test_weights_are_a_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelError, match=rf"^{path}: not a safetensors file"):
        open_model(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which we do not open")
    expected = "no weights: expected model.safetensors or model.safetensors.index.json"
    with pytest.raises(ModelError, match=expected):
        open_model(folder)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_model(tmp_path / "sharded", **SIZES, num_shards=3)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    names = set(load_file(shard))
    shard.unlink()
    with pytest.raises(WeightsError) as caught:
        open_model(sharded)
    assert caught.value.tensor in names
    assert caught.value.expected == f"the shard {shard.name}"
    assert caught.value.found == "no such file"


def test_a_tensor_missing_in_its_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shard)
    with pytest.raises(WeightsError, match=rf"tensor '{name}': .* found no such tensor"):
        open_model(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightsError) as caught:
        open_model(sharded)
    assert caught.value.source == f"{shard}: truncated"


def test_a_tensor_the_index_forgets(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][C_ATTN]
    path.write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"tensor '{C_ATTN}': .* found no such tensor"):
        open_model(sharded)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        "[" * 10**5,
    ],
    ids=range(9),
)
def test_not_an_index(sharded: Path, content: str) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=rf"^{path}: not a safetensors index"):
        open_model(sharded)
