"""A library on disk: what is written is read; what is not as it was written is refused."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from serve.compiler import library
from serve.compiler.library import (
    LIBRARY_FILE,
    MANIFEST_FILE,
    Manifest,
    file_digest,
    open_library,
    write_manifest,
)
from serve.errors import LibraryError

pytestmark = pytest.mark.unit

CODE = bytes(range(256)) * 40

MANIFEST = Manifest(
    key="k" * 64,
    digest="",
    model_config={"n_layer": 2, "layer_norm_epsilon": 1e-05, "tie_word_embeddings": True},
    backend="cpu",
    target={"kind": "llvm", "mcpu": "skylake", "mattr": ["-avx512f"]},
    dtype="float32",
    quantization="q0f32",
    profile="full",
    profile_digest="p" * 64,
    rules=({"id": "cpu.gemv", "parameters": {"vectors": 4}}, {"id": "é", "parameters": {}}),
    coverage=({"kernel": "add", "rule": None, "as_written": False, "called_by": ["decode"]},),
    parameters=(("transformer.wte.weight", (1000, 64)), ("transformer.ln_f.bias", (64,))),
    packed=("transformer.wte.weight",),
    panel=64,
    kv_cache="pages",
    page_size=16,
    tvm_version="0.27.0",
    pipeline_version=1,
    compile_seconds=5.25,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / LIBRARY_FILE).write_bytes(CODE)
    write_manifest(tmp_path, replace(MANIFEST, digest=file_digest(tmp_path / LIBRARY_FILE)))
    return tmp_path


def read(folder: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
    return raw


def test_what_is_written_is_read(folder: Path) -> None:
    opened = open_library(folder)
    assert opened.path == folder / LIBRARY_FILE
    assert opened.manifest == replace(MANIFEST, digest=file_digest(opened.path))
    assert open_library(folder) == opened


def test_the_manifest_is_plain_json(folder: Path) -> None:
    raw = read(folder)
    assert set(raw) == set(asdict(MANIFEST)) | {"manifest_digest"}
    assert raw["parameters"][0] == ["transformer.wte.weight", [1000, 64]]
    assert raw["coverage"][0]["rule"] is None


@pytest.mark.parametrize("position", [0, 1, 7, 5000, len(CODE) - 1])
def test_a_flipped_bit_in_the_code(folder: Path, position: int) -> None:
    damaged = bytearray(CODE)
    damaged[position] ^= 1
    (folder / LIBRARY_FILE).write_bytes(damaged)
    with pytest.raises(LibraryError, match=rf"^{folder / LIBRARY_FILE}: damaged: its sha256 is"):
        open_library(folder)


@pytest.mark.parametrize("code", [b"", CODE[:-1], CODE + b"\0", CODE[: len(CODE) // 2]])
def test_code_cut_short_or_too_long(folder: Path, code: bytes) -> None:
    (folder / LIBRARY_FILE).write_bytes(code)
    with pytest.raises(LibraryError, match="damaged"):
        open_library(folder)


def test_no_byte_of_the_manifest_may_change(folder: Path) -> None:
    """Whatever the damage, it is found, unless it does not change what the manifest says."""
    path = folder / MANIFEST_FILE
    whole, opened = path.read_bytes(), open_library(folder)
    random_ = random.Random(0)
    num_accepted = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] = random_.choice([damaged[position] ^ 1, random_.randrange(256)])
        path.write_bytes(damaged)
        try:
            assert open_library(folder) == opened
            num_accepted += 1
        except LibraryError:
            continue
    assert num_accepted < whole.count(b" ") + whole.count(b"\n") + len(whole) / 100


def test_a_manifest_cut_short_anywhere(folder: Path) -> None:
    path = folder / MANIFEST_FILE
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library"):
            open_library(folder)


@pytest.mark.parametrize("name", [LIBRARY_FILE, MANIFEST_FILE])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library: .*{name}"):
        open_library(folder)
    (folder / name).mkdir()
    with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library: "):
        open_library(folder)


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library"):
            open_library(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "1", '"text"', "\0", "{" * 50, "[1, 2]", "[" * 100_000],
    ids=range(10),
)
def test_a_manifest_that_is_none(folder: Path, text: str) -> None:
    (folder / MANIFEST_FILE).write_text(text)
    with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library"):
        open_library(folder)


def test_a_manifest_that_is_not_text(folder: Path) -> None:
    (folder / MANIFEST_FILE).write_bytes(b"\xff\xfe" + (folder / MANIFEST_FILE).read_bytes())
    with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library"):
        open_library(folder)


@pytest.mark.parametrize("key", asdict(MANIFEST))
@pytest.mark.parametrize("value", [None, 17, "text", [], {}, [["a"]], True])
def test_an_edited_manifest(folder: Path, key: str, value: Any) -> None:
    raw = read(folder)
    (folder / MANIFEST_FILE).write_text(json.dumps(raw | {key: value}))
    with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library: .*is damaged"):
        open_library(folder)


@pytest.mark.parametrize("key", [*asdict(MANIFEST), "manifest_digest"])
def test_a_manifest_without_one_key(folder: Path, key: str) -> None:
    raw = read(folder)
    del raw[key]
    (folder / MANIFEST_FILE).write_text(json.dumps(raw))
    with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library"):
        open_library(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"parameters": 5},
        {"parameters": "text"},
        {"parameters": [["name"]]},
        {"parameters": [["name", 3]]},
        {"parameters": [["name", [1], 2]]},
        {"parameters": None},
        {"rules": 5},
        {"coverage": None},
        {"of_another_version": 1},
    ],
)
def test_a_manifest_of_another_program(folder: Path, wrong: dict[str, Any]) -> None:
    """Signed right, and yet not what we read."""
    raw = {key: value for key, value in read(folder).items() if key != "manifest_digest"} | wrong
    signed = raw | {"manifest_digest": library._digest(raw)}
    (folder / MANIFEST_FILE).write_text(json.dumps(signed))
    with pytest.raises(LibraryError, match=rf"^{folder}: not a compiled library"):
        open_library(folder)
