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
from serve.loading import Loader, _Layout, _Need
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


@pytest.mark.parametrize("others_first", [False, True])
def test_loads_side_by_side_share_weights_of_a_layout_not_known_yet(others_first: bool) -> None:
    loader, packed = Loader(), _Layout(16)
    loader._claims = Claims(lambda: 150, lambda: 0)
    a, b = (_Need("toy", "cpu", weights=100, kv_cache=20) for _ in "ab")
    loader._claim_memory(a)
    if others_first:
        loader._claim_memory(b)
        loader._claim_memory(a, packed)
    else:
        loader._claim_memory(a, packed)
        loader._claim_memory(b)
    loader._claim_memory(b, packed)
    assert sum(loader._claims.parts().values()) == 140


def test_unpacked_weights_and_packed_ones_are_two() -> None:
    """Unpacked is a layout that is known."""
    mib = 1 << 20
    loader = Loader()
    loader._claims = Claims(lambda: 150 * mib, lambda: 0)
    baseline, full = (_Need("toy", "cpu", 100 * mib, 20 * mib) for _ in range(2))
    loader._claim_memory(baseline, _Layout(None))
    loader._claim_memory(full)
    with pytest.raises(LoadError, match="toy needs 100 MiB for its weights, 20 MiB for its KV"):
        loader._claim_memory(full, _Layout(16))


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
