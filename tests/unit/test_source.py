"""Every form of a model's spec, and the errors of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.errors import ModelError, WeightsError
from serve.model import source
from serve.model.checkpoint import Checkpoint
from serve.model.config import SIZES
from serve.model.hub import HubConfig
from serve.model.parameters import parameter_shapes
from serve.model.source import find_model
from serve.model.synthetic import SyntheticWeights
from tests.models import write_model

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, HubConfig]]:
    """What was asked of the hub, which has nothing."""
    asked: list[tuple[str, HubConfig]] = []

    def fetch(repo_id: str, config: HubConfig) -> Path:
        asked.append((repo_id, config))
        raise ModelError(f"hub model {repo_id!r}: asked for")

    monkeypatch.setattr(source, "fetch", fetch)
    return asked


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "my-model", vocab_size=40, n_embd=16, n_layer=1)


def test_bundled() -> None:
    model = find_model("bundled:gettysburg")
    assert (model.spec, model.name, model.is_noise) == ("bundled:gettysburg", "gettysburg", False)
    assert model.config.vocab_size == 50257
    weights = model.load()
    assert {name: array.shape for name, array in weights.items()} == parameter_shapes(model.config)
    assert model.folder is not None
    assert (model.folder / "model.safetensors").is_file()


@pytest.mark.parametrize("size", SIZES)
def test_synthetic(size: str) -> None:
    model = find_model(f"synthetic:{size}")
    assert (model.spec, model.name) == (f"synthetic:{size}", f"synthetic-{size}")
    assert model.config == SIZES[size]
    assert model.is_noise
    assert model.folder is None
    weights = model.load()
    assert isinstance(weights, SyntheticWeights)
    assert weights["transformer.ln_f.bias"].shape == (model.config.n_embd,)


def test_a_folder(folder: Path) -> None:
    model = find_model(str(folder))
    assert (model.spec, model.name, model.is_noise) == (str(folder), "my-model", False)
    assert model.folder == folder
    assert isinstance(model.load(), Checkpoint)


@pytest.mark.parametrize("spec", ["my-model", "./my-model", "my-model/", "../{0}/my-model"])
def test_a_relative_folder(folder: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(folder.parent)
    model = find_model(spec.format(folder.parent.name))
    assert model.name == "my-model"
    assert model.config.vocab_size == 40


def test_the_folder_we_are_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_model(".").name == "my-model"


def test_a_folder_under_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/my-model").name == "my-model"


def test_a_folder_wins_over_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hub: list[Any]
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    assert find_model(f"{folder.parent.name}/my-model").name == "my-model"
    assert hub == []


def test_weights_are_read_when_they_are_asked_for(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    model = find_model(str(folder))
    with pytest.raises((ModelError, WeightsError), match=r"model\.safetensors"):
        model.load()


@pytest.mark.parametrize("spec", ["gpt2", "openai-community/gpt2", "no:scheme", "gpt2.safetensors"])
def test_all_else_is_the_hubs(hub: list[tuple[str, HubConfig]], spec: str) -> None:
    options = HubConfig(revision="v1")
    with pytest.raises(ModelError, match=rf"hub model '{spec}': asked for"):
        find_model(spec, options)
    with pytest.raises(ModelError):
        find_model(spec)
    assert hub == [(spec, options), (spec, HubConfig())]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("bundled:nothing", r"no such bundled model; known: gettysburg"),
        ("synthetic:gpt3", r"no such size; known: distilgpt2, gpt2, gpt2-medium, gpt2-large, gpt2"),
        ("synthetic:GPT2", r"no such size"),
        ("./nowhere", r"no such folder"),
        ("/nowhere/at/all", r"no such folder"),
        ("~/nowhere", r"no such folder"),
        ("../nowhere", r"no such folder"),
        ("~nobody-by-this-name/model", r"no such folder"),
        ("/" + "long" * 1000, r"no such folder"),
        ("a/b/c", r"no such folder"),
        ("https://huggingface.co/gpt2", r"no such folder"),
        ("", r"no such folder"),
        ("bundled:", r"no such bundled model; known: gettysburg"),
        ("synthetic:", r"no such size; known: distilgpt2"),
    ],
)
def test_a_spec_that_is_none(hub: list[Any], spec: str, problem: str) -> None:
    with pytest.raises(ModelError, match=f"model {spec!r}: {problem}"):
        find_model(spec)
    assert hub == []


def test_a_file_is_not_a_folder(folder: Path) -> None:
    spec = str(folder / "config.json")
    with pytest.raises(ModelError, match=rf"model '{spec}': no such folder"):
        find_model(spec)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"^{tmp_path}/config\.json: not found"):
        find_model(str(tmp_path))
