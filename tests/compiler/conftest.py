"""A toy model, a cache of its libraries, and rules that misbehave."""

from __future__ import annotations

import importlib
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm

from profiles import Profile, load_profile, read_profile
from serve.backends import get_backend
from serve.compiler.cache import LibraryCache
from serve.compiler.compile import Compiled, CompileJob, get_library
from serve.compiler.coverage import panel_of
from serve.compiler.pipeline import fuse
from serve.model.config import GPT2Config
from serve.model.gpt2 import export

TOY = GPT2Config(vocab_size=1000, n_positions=64, n_embd=64, n_layer=2, n_head=4, n_inner=256)


def toy_job(profile: Profile | str = "full") -> CompileJob:
    if isinstance(profile, str):
        profile = load_profile(profile)
    return CompileJob(TOY, get_backend("cpu"), profile)


def fused_toy(
    backend: str, profile: str = "baseline", **changes: Any
) -> tuple[tvm.IRModule, tvm.target.Target]:
    """The kernels of the toy, with these changes, as the profile's rules are offered them."""
    config = replace(TOY, **changes)
    request = CompileJob(config, get_backend(backend), load_profile(profile)).request()
    rules = load_profile(profile).rules_for(backend, get_backend(backend).family)
    target = tvm.target.Target(request["target"])
    with target:
        mod = export(config, panel_of(rules, target), request["kv_cache"])[0]
        return fuse(mod), target


def kernels_of(mod: tvm.IRModule) -> set[str]:
    functions: Any = mod.functions_items()
    return {var.name_hint for var, func in functions if isinstance(func, tvm.tirx.PrimFunc)}


def is_running(process_id: int) -> bool:
    """Whether it is there, and not just waiting to be collected."""
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: Callable[[], bool]) -> None:
    """Only as long as a test should ever hang."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for a minute")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LibraryCache:
    return LibraryCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def compiled(cache: LibraryCache) -> tuple[Compiled, list[str]]:
    """The toy under `full`, compiled now, and the progress that was reported."""
    progress: list[str] = []
    return get_library(toy_job(), cache, progress.append), progress


Plugin = Callable[..., Profile]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """Install a rule as pip does, `test.rule`; gives a profile that has it alone.

    `apply` is the body of its method, over `func`; `on_import` runs in the compiler's process only.
    """
    monkeypatch.syspath_prepend(tmp_path / "site")

    def install(apply: str, on_import: str = "") -> Profile:
        info = tmp_path / "site" / "plugin-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[dlight_serve.rules]\nplugin = plugin_rule:RULE\n")
        (info.parent / "plugin_rule.py").write_text(
            "import os, signal, subprocess, sys, time\n"
            "from pathlib import Path\n"
            "from profiles import Rule\n"
            "RULE = Rule('test.rule', 'cpu', 'plugin_rule:TestRule', 'for a test')\n"
            "class TestRule:\n"
            "    def apply(self, func, target, _):\n"
            f"        {apply}\n"
            f"if sys.argv[0].endswith('pipeline.py'):\n    pass\n    {on_import}\n"
        )
        profile = tmp_path / "own.toml"
        profile.write_text('[cpu]\nrules = ["test.rule"]\n')
        sys.modules.pop("plugin_rule", None)
        importlib.invalidate_caches()
        return read_profile(profile)

    return install


# Instruction sets to compile for: this machine's own, AVX2, and the oldest x86-64.
CPUS = ("here", "haswell", "x86-64")


def target_for(cpu: str) -> tvm.target.Target:
    """Skips the test if this machine cannot run what is compiled for it."""
    if cpu != "here" and platform.machine() != "x86_64":
        pytest.skip(f"{cpu} is an x86-64")
    backend = get_backend("cpu", None if cpu == "here" else cpu)
    missing = backend.missing_features(backend.target())
    if missing:
        pytest.skip(f"this machine lacks features of {cpu}: {', '.join(missing)}")
    return tvm.target.Target(dict(backend.target()))
