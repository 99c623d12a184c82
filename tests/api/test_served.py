"""Which library a name means: the default, an alias, or one drawn by the traffic's weights."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from serve.api.app import ServedModel, ServedModels
from serve.engine import Engine
from serve.errors import EngineError, ModelError, ModelNotFoundError
from tests.api.conftest import TOKENIZER
from tests.fakes import FakeRunner

pytestmark = pytest.mark.api


def library(profile: str, digest: str = "") -> ServedModel:
    return ServedModel(
        name="gpt2",
        aliases=(f"gpt2@{profile}", f"gpt2@cpu:{profile}"),
        backend="cpu",
        profile=profile,
        quantization="q0f32",
        max_context=16,
        digest=digest,
        created=0,
        tokenizer=TOKENIZER,
        engine=Engine(FakeRunner()),
        other_names=("openai/gpt2",),
    )


FULL, GEMV, STOCK = library("full"), library("gemv"), library("stock")


@pytest.fixture
def models() -> ServedModels:
    return ServedModels([FULL, GEMV, STOCK], sticky_header="x-session-id")


def test_names(models: ServedModels) -> None:
    assert models.default is FULL
    assert models.find("gpt2") is models.find("openai/gpt2") is FULL
    assert models.find("gpt2@gemv") is models.find("gpt2@cpu:gemv") is GEMV
    models.set_default(GEMV)
    assert models.find("gpt2") is GEMV
    assert models.find("gpt2@full") is FULL
    assert len(models.names) == len(set(models.names)) == 8
    with pytest.raises(ModelNotFoundError, match="gpt2@stock"):
        models.find("gpt3")
    with pytest.raises(ModelError, match="gpt2@full"):
        models.add(library("full"))


def test_what_is_removed_has_no_name(models: ServedModels) -> None:
    models.set_traffic({FULL: 1.0, GEMV: 1.0})
    models.remove(FULL)
    assert models.traffic == {GEMV: 1.0}
    assert models.default is GEMV
    with pytest.raises(ModelNotFoundError):
        models.find("gpt2@full")
    for model in (GEMV, STOCK):
        models.remove(model)
    with pytest.raises(ModelNotFoundError):
        models.find("gpt2")
    assert not models.is_ready


def test_a_library_that_comes_again_has_its_part(models: ServedModels) -> None:
    models.set_traffic({FULL: 3.0, GEMV: 1.0})
    again = library("full", "again")
    models.replace(FULL, again)
    assert models.default is models.find("gpt2@full") is again
    assert models.traffic == {again: 3.0, GEMV: 1.0}


def test_traffic_follows_the_weights(models: ServedModels) -> None:
    models.set_traffic({FULL: 3.0, GEMV: 1.0})
    seen = Counter(models.find("gpt2").profile for _ in range(4000))
    assert seen.keys() == {"full", "gemv"}
    assert 2700 < seen["full"] < 3300
    assert models.find("gpt2@stock") is STOCK
    models.set_default(STOCK)  # ends the split
    assert {models.find("gpt2") for _ in range(50)} == {STOCK}


def test_traffic_is_sticky(models: ServedModels) -> None:
    models.set_traffic({FULL: 1.0, GEMV: 1.0})
    by_user = {
        who: {models.find("gpt2", {"x-session-id": who}) for _ in range(20)}
        for who in map(str, range(200))
    }
    assert all(len(seen) == 1 for seen in by_user.values())
    shares = Counter(model.profile for seen in by_user.values() for model in seen)
    assert min(shares.values()) > 60


def test_a_request_whose_library_goes_is_given_to_another(models: ServedModels) -> None:
    asked: list[str] = []

    async def submit(model: ServedModel) -> str:
        asked.append(model.profile)
        if model is FULL:  # unloaded between the choice and the queue
            models.remove(FULL)
            raise EngineError("draining")
        return model.profile

    model, result = asyncio.run(models.submit("gpt2", {}, submit))
    assert (model, result) == (GEMV, "gemv")
    assert asked == ["full", "gemv"]


def test_an_engine_that_fails_is_asked_once(models: ServedModels) -> None:
    asked: list[str] = []

    async def submit(model: ServedModel) -> str:
        asked.append(model.profile)
        raise EngineError("dead")

    with pytest.raises(EngineError):
        asyncio.run(models.submit("gpt2", {}, submit))
    assert asked == ["full"]
