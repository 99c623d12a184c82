"""A library compiled in a child process: its phases, its manifest, and every way it can fail."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import relax

from profiles import ProfileError, list_profiles, load_profile, read_profile
from serve.backends import Backend, get_backend
from serve.compiler import compile as compile_
from serve.compiler.cache import LibraryCache
from serve.compiler.compile import Compiled, CompileJob, compile_in_child, get_library
from serve.compiler.library import open_library
from serve.compiler.pipeline import PHASES
from serve.errors import CompileError, LibraryError
from serve.model.config import GPT2Config
from serve.model.parameters import parameter_shapes
from tests.compiler.conftest import TOY, Plugin, is_running, toy_job, wait_until

pytestmark = pytest.mark.compiler

REPORTED = [f"[{number}/{len(PHASES)}] {phase}" for number, phase in enumerate(PHASES, 1)]


def test_every_phase_is_reported_in_order(compiled: tuple[Compiled, list[str]]) -> None:
    result, progress = compiled
    assert result.source == "compiled"
    assert progress == REPORTED


def test_the_second_time_it_comes_from_the_cache(
    compiled: tuple[Compiled, list[str]], cache: LibraryCache
) -> None:
    progress: list[str] = []
    again = get_library(toy_job(), cache, progress.append)
    assert (again.source, again.library, progress) == ("cache", compiled[0].library, [])


def test_the_manifest_says_what_was_asked_for(compiled: tuple[Compiled, list[str]]) -> None:
    manifest, request = compiled[0].library.manifest, toy_job().request()
    for key in (
        "key", "model_config", "backend", "target", "dtype", "profile", "profile_digest",
        "kv_cache", "pipeline_version", "tvm_version",
    ):  # fmt: skip
        assert getattr(manifest, key) == request[key], key
    assert list(manifest.rules) == request["rules"]
    assert dict(manifest.parameters) == parameter_shapes(TOY)
    assert (manifest.quantization, manifest.page_size) == ("q0f32", 16)
    assert manifest.compile_seconds > 0


def test_the_library_has_its_functions(compiled: tuple[Compiled, list[str]]) -> None:
    module = tvm.runtime.load_module(str(compiled[0].library.path))
    machine = relax.VirtualMachine(module, tvm.cpu())
    for name in ("batch_prefill", "decode", "batch_decode", "batch_verify"):
        assert machine[name] is not None
    with pytest.raises(Exception, match="no_such_function"):
        machine["no_such_function"]


def test_another_process_compiles_the_same(
    compiled: tuple[Compiled, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the replicas of one server would have different fingerprints."""
    monkeypatch.setenv("PYTHONHASHSEED", "1234")
    compile_in_child(toy_job().request() | {"folder": str(tmp_path)}, lambda _: None, 600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["library.so", "manifest.json"]
    assert open_library(tmp_path).manifest.digest == compiled[0].library.manifest.digest


def key(job: CompileJob) -> str:
    found: str = job.request()["key"]
    return found


def test_a_key_is_of_all_that_decides_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(text: str) -> CompileJob:
        path = tmp_path / "own.toml"
        path.write_text(f"[cpu]\n{text}\n")
        return toy_job(read_profile(path))

    def with_target(**more: Any) -> Backend:
        cpu = get_backend("cpu")
        return replace(cpu, target=lambda: {**cpu.target(), **more})

    plain = key(toy_job())
    assert re.fullmatch("[0-9a-f]{64}", plain)
    assert key(toy_job()) == plain
    keys = [plain]
    keys += [
        key(replace(toy_job(), config=replace(TOY, **change)))
        for change in (
            {"n_layer": 3},
            {"vocab_size": 1001},
            {"tie_word_embeddings": False},
            {"scale_attn_by_inverse_layer_idx": True},
            {"layer_norm_epsilon": 1e-6},
        )
    ]
    keys += [key(toy_job(name)) for name in ("baseline", "gemv", "reduction")]
    gemv = 'rules = ["cpu.gemv"]\n'
    keys += [key(own(gemv + f'[cpu.parameters."cpu.gemv"]\nvectors = {n}')) for n in (1, 2)]
    keys += [
        key(own(f"rules = {ids}"))
        for ids in ('["cpu.gemv", "dl.cpu.Reduction"]', '["dl.cpu.Reduction", "cpu.gemv"]')
    ]
    keys += [key(replace(toy_job(), backend=with_target(mcpu="x86-64")))]
    keys += [key(replace(toy_job(), backend=with_target(mattr=["-avx"])))]
    keys += [key(CompileJob(TOY, get_backend("cuda"), load_profile("full")))]
    monkeypatch.setattr(compile_, "PIPELINE_VERSION", 10_000)
    keys += [key(toy_job())]
    monkeypatch.setattr(tvm, "__version__", "0.99")
    keys += [key(toy_job())]
    assert len(set(keys)) == len(keys)


def test_the_kv_cache_follows_from_the_rules() -> None:
    """Pages of our own with cpu.attention, TVM's cache with any other rules."""
    for name in list_profiles():
        request = toy_job(name).request()
        has_attention = "cpu.attention" in [rule["id"] for rule in request["rules"]]
        assert request["kv_cache"] == ("pages" if has_attention else "tvm"), name
    on_a_gpu = CompileJob(TOY, get_backend("cuda"), load_profile("full"))
    assert on_a_gpu.request()["kv_cache"] == "tvm"


def test_a_key_is_of_nothing_else(tmp_path: Path) -> None:
    """Where the profile's file lies, and how it is worded."""
    text = Path(load_profile("full").source).read_text()
    path = tmp_path / "full.toml"
    path.write_text(text.replace("description = ", "# mine\ndescription = "))
    assert key(toy_job(read_profile(path))) == key(toy_job())


def test_a_profile_that_does_not_know_the_backend(tmp_path: Path, cache: LibraryCache) -> None:
    path = tmp_path / "gpu_only.toml"
    path.write_text('[gpu]\nrules = ["dl.gpu.Fallback"]\n')
    with pytest.raises(ProfileError, match=r"gpu_only\.toml: cpu: .* has no rules for it"):
        get_library(toy_job(read_profile(path)), cache)


def assert_nothing_is_left(cache: LibraryCache) -> None:
    root = cache.folder("x").parent
    assert [path.name for path in root.iterdir() if path.suffix != ".lock"] == []


@pytest.fixture
def empty(tmp_path: Path) -> LibraryCache:
    return LibraryCache(tmp_path / "cache")


def test_a_rule_that_fails(plugin: Plugin, empty: LibraryCache) -> None:
    """The error names rule and kernel. What rules print is not taken for progress."""
    noise = r"""print('{"phase": "lunch"}\n[1]\nnull\n{}\n"x"\n{', flush=True)"""
    bytes_ = r"os.write(1, b'\xff\xfe{\n'); os.write(2, b'\xff is not text\n')"
    progress: list[str] = []
    job = toy_job(plugin(f"{noise}; {bytes_}; raise ValueError('cannot split')"))
    with pytest.raises(CompileError) as caught:
        get_library(job, empty, progress.append)
    error = caught.value
    assert str(error).startswith("compiling profile 'own' on backend 'cpu' failed\n")
    assert re.search(r"rule test\.rule failed on kernel \w+: cannot split", error.log)
    assert "is not text" in error.log
    assert error.log.rstrip() in str(error)
    assert len(error.log.splitlines()) <= 40
    assert progress == REPORTED[:3]
    assert_nothing_is_left(empty)


def test_a_rule_that_cannot_be_imported_there(plugin: Plugin, empty: LibraryCache) -> None:
    profile = plugin("pass", on_import="raise RuntimeError('no licence here')")
    with pytest.raises(CompileError) as caught:
        get_library(toy_job(profile), empty)
    assert "ProfileError: entry point dlight_serve.rules: plugin" in caught.value.log
    assert "no licence here" in caught.value.log
    assert_nothing_is_left(empty)


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_crash_of_the_compiler(plugin: Plugin, empty: LibraryCache, name: str) -> None:
    """As TVM's own Matmul does on metal. The server lives."""
    say = "print('tensorizing', file=sys.stderr, flush=True)"
    job = toy_job(plugin(f"{say}; os.kill(os.getpid(), signal.{name})"))
    with pytest.raises(CompileError) as caught:
        get_library(job, empty)
    expected = f"compiling profile 'own' on backend 'cpu' crashed with {name}"
    assert str(caught.value).startswith(expected)
    assert "tensorizing" in caught.value.log
    assert_nothing_is_left(empty)


def test_files_that_may_not_be_so_large(plugin: Plugin, empty: LibraryCache) -> None:
    """As LLVM says it, which then aborts."""
    set_limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (20_000, 20_000))"
    with pytest.raises(CompileError) as caught:
        get_library(toy_job(plugin("pass", on_import=set_limit)), empty)
    first = str(caught.value).splitlines()[0]
    root = empty.folder("x").parent
    assert first == f"compiling profile 'own' on backend 'cpu' failed: File too large: {root}"
    assert_nothing_is_left(empty)


def test_a_full_disk(plugin: Plugin, empty: LibraryCache) -> None:
    """As Python says it, which writes the manifest."""
    full = "raise OSError(28, os.strerror(28), 'manifest.json')"
    fails = f"Path.write_text = lambda *_, **__: exec({full!r}, dict(os=os))"
    with pytest.raises(CompileError) as caught:
        get_library(toy_job(plugin("pass", on_import=fails)), empty)
    root = empty.folder("x").parent
    expected = "compiling profile 'own' on backend 'cpu' failed: No space left on device"
    assert str(caught.value).splitlines()[0] == f"{expected}: {root}"
    assert_nothing_is_left(empty)


def test_a_compiler_that_ends_early(plugin: Plugin, empty: LibraryCache) -> None:
    """Even if it says that all is well."""
    job = toy_job(plugin("pass", on_import="os._exit(0)"))
    with pytest.raises(LibraryError, match="not a compiled library"):
        get_library(job, empty)
    assert_nothing_is_left(empty)


def test_a_time_limit(plugin: Plugin, empty: LibraryCache) -> None:
    job = toy_job(plugin("time.sleep(3600)"))
    with pytest.raises(CompileError, match=r"on backend 'cpu' took longer than 0\.5 s and was st"):
        get_library(job, empty, time_limit_seconds=0.5)
    assert_nothing_is_left(empty)


def test_a_crash_that_leaves_something_behind(
    plugin: Plugin, empty: LibraryCache, tmp_path: Path
) -> None:
    """Such as a linker, which has the pipes too. Nobody waits for it, nor for the limit."""
    pid, lived_on = tmp_path / "pid", tmp_path / "lived_on"
    start = f"child = subprocess.Popen(['sh', '-c', 'sleep 120; touch {lived_on}'])"
    write = f"Path({str(pid)!r}).write_text(str(child.pid))"
    crash = "os.kill(os.getpid(), signal.SIGKILL)"
    job = toy_job(plugin("pass", on_import=f"{start}; {write}; {crash}"))
    with pytest.raises(CompileError, match="on backend 'cpu' crashed with SIGKILL"):
        get_library(job, empty)
    wait_until(lambda: not is_running(int(pid.read_text())))
    assert not lived_on.exists()
    assert_nothing_is_left(empty)


def test_a_crash_before_the_limit_is_no_time_limit(
    plugin: Plugin, empty: LibraryCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though something holds the pipes that cannot be killed with it, having left the group."""
    pid, end = tmp_path / "pid", tmp_path / "end"
    sleep = f"while [ ! -e {end} ]; do sleep 0.1; done"
    start = f"subprocess.Popen(['timeout', '120', 'sh', '-c', {sleep!r}], start_new_session=True)"
    write = f"Path({str(pid)!r}).write_text(str(os.getpid()))"
    crash = "os.kill(os.getpid(), signal.SIGKILL)"
    job = toy_job(plugin("pass", on_import=f"{start}; {write}; {crash}"))

    class AfterTheCrash(threading.Timer):
        def run(self) -> None:
            wait_until(lambda: pid.exists() and pid.read_text() != "")
            wait_until(lambda: not Path(f"/proc/{pid.read_text()}").exists())
            self.function()
            end.touch()

    monkeypatch.setattr(threading, "Timer", AfterTheCrash)
    with pytest.raises(CompileError, match="on backend 'cpu' crashed with SIGKILL"):
        get_library(job, empty)
    assert_nothing_is_left(empty)


def test_who_stops_waiting_stops_the_compiler_and_all_it_has_started(
    plugin: Plugin, empty: LibraryCache, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    start = "child = subprocess.Popen(['sleep', '3600'])"
    write = f"Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')"
    job = toy_job(plugin("time.sleep(3600)", on_import=f"{start}; {write}"))

    def interrupt(phase: str) -> None:
        if "export" in phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_library(job, empty, interrupt)
    wait_until(lambda: not any(is_running(int(pid)) for pid in pids.read_text().split()))
    assert_nothing_is_left(empty)


def test_a_profile_that_is_changed_in_the_meantime(tmp_path: Path) -> None:
    """Its library would lie under the key of another."""
    path = tmp_path / "own.toml"
    path.write_text("[cpu]\nrules = []\n")
    request = toy_job(read_profile(path)).request()
    path.write_text('[cpu]\nrules = ["cpu.gemv"]\n')
    with pytest.raises(CompileError, match=r"own\.toml was changed in the meantime"):
        compile_in_child(request | {"folder": str(tmp_path)}, lambda _: None, 600)
    assert [file.name for file in tmp_path.iterdir()] == ["own.toml"]


def test_a_model_the_backend_cannot_do(empty: LibraryCache) -> None:
    """TVM's GPU attention kernels do not come in every head size."""
    config = GPT2Config(vocab_size=100, n_embd=12, n_head=1, n_layer=1, n_inner=16)
    with pytest.raises(CompileError, match="on backend 'cuda' failed") as caught:
        get_library(CompileJob(config, get_backend("cuda"), load_profile("full")), empty)
    assert "ValueError" in caught.value.log
    assert_nothing_is_left(empty)


def test_the_request_is_plain_json() -> None:
    request = toy_job().request()
    assert json.loads(json.dumps(request)) == request
    assert os.path.isabs(request["profile_source"])
