"""The loader: what it refuses before it compiles, and what it promises to whom."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from typing import Any

import pytest

from serve import loading
from serve.compiler.cache import LibraryCache
from serve.config import LibrarySection, Settings
from serve.engine.host import Prepared
from serve.errors import LoadError
from serve.loading import Loader
from serve.memory import Claims
from serve.placement import LoadRequest, Placement
from serve.runtime.config import RunnerConfig

pytestmark = pytest.mark.compiler
KV_TOKENS = 100_000


@pytest.fixture
def settings(cache: LibraryCache) -> Settings:
    library = LibrarySection(profile="baseline", cache_dir=str(cache.folder("x").parent.parent))
    return Settings(library=library, runner=RunnerConfig(kv_tokens=KV_TOKENS))


def load(loader: Loader, settings: Settings) -> Prepared:
    return loader.prepare(LoadRequest(settings, Placement("cpu", "baseline")), lambda _: None)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(loading, "get_library", fail)


@pytest.mark.usefixtures("no_compiler")
def test_more_threads_than_cpus(settings: Settings) -> None:
    cpus = os.cpu_count() or 1
    runner = RunnerConfig(threads=cpus + 1)
    with pytest.raises(LoadError, match=rf"^runner\.threads = {cpus + 1}: expected at most {cpus}"):
        load(Loader(), replace(settings, runner=runner))


@pytest.mark.usefixtures("no_compiler")
def test_what_cannot_fit_is_not_compiled(settings: Settings) -> None:
    runner = RunnerConfig(kv_tokens=10**12)
    with pytest.raises(
        LoadError, match=r"^out of memory: gettysburg needs \d+ MiB for its weights"
    ):
        load(Loader(), replace(settings, runner=runner))


def test_promises_are_kept(settings: Settings) -> None:
    """A KV cache takes its memory when requests come. Only what is unloaded gives it back."""
    kv_bytes = KV_TOKENS * loading.select(settings).model.config.kv_bytes_per_token()
    loader = Loader()
    loader._claims = Claims(lambda: int(1.9 * kv_bytes), lambda: 0)
    first = load(loader, settings)
    with pytest.raises(LoadError, match=r"of which other libraries may take \d+ MiB; lower"):
        load(loader, settings)
    del first
    gc.collect()
    assert not loader._claims.parts()
    load(loader, settings)


@pytest.mark.usefixtures("no_compiler")
def test_what_is_promised_to_a_load_under_way_counts(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_bytes = KV_TOKENS * loading.select(settings).model.config.kv_bytes_per_token()
    loader = Loader()
    loader._claims = Claims(lambda: int(1.9 * kv_bytes), lambda: 0)

    def load_another(*_: Any) -> None:
        monkeypatch.undo()
        load(loader, settings)

    monkeypatch.setattr(loading, "get_library", load_another)
    with pytest.raises(LoadError, match="of which other libraries may take"):
        load(loader, settings)
    assert not loader._claims.parts()


def test_a_failed_load_promises_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no pages")

    loader = Loader()
    monkeypatch.setattr(loading, "TVMRunner", fail)
    with pytest.raises(LoadError, match="out of memory for cpu:baseline: no pages"):
        load(loader, settings)
    assert not loader._claims.parts()


def test_limits_that_no_step_can_reach(settings: Settings) -> None:
    """TVM's cache would have room for them all."""
    huge = RunnerConfig(max_batch=10**8, max_step_tokens=10**8, kv_tokens=1000)
    limits = load(Loader(), replace(settings, runner=huge)).runner.limits
    assert (limits.max_batch, limits.max_step_tokens) == (63, 1000)
