"""Backends: the known ones, their targets, what this machine lacks. Needs TVM; compiles nothing."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tvm
from tvm.target import codegen

from serve.backends import BACKENDS, cpu, cuda, get_backend, usable_cpus
from serve.backends.backend import existing_device
from serve.errors import BackendError

pytestmark = pytest.mark.compiler


def test_the_known_backends() -> None:
    assert {name: get_backend(name).family for name in BACKENDS} == {"cpu": "cpu", "cuda": "gpu"}
    assert all(backend.name == name for name, backend in BACKENDS.items())
    assert all(backend.dtype == "float32" for backend in BACKENDS.values())


@pytest.mark.parametrize("name", ["tpu", "CPU", "", "cuda:0"])
def test_an_unknown_backend(name: str) -> None:
    with pytest.raises(BackendError, match=f"^unknown backend {name!r}; known: cpu, cuda$"):
        get_backend(name)


def test_cpu() -> None:
    backend = get_backend("cpu")
    target = tvm.target.Target(backend.target())
    assert target.kind.name == "llvm"
    assert target.attrs["mcpu"] == codegen.llvm_get_system_cpu()
    assert backend.target() == backend.target()
    assert backend.device().exist


def test_cpu_features_that_the_processor_has_and_this_machine_hides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as AVX-512 under a hypervisor: a library that used it would die of SIGILL."""
    name = "tvm.codegen.llvm.GetHostCPUFeatures"
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: "skylake-avx512")
    present = {"avx2": True, "fma": True, "avx512f": False, "avx512vl": False, "amx-tile": False}

    def features_of(values: dict[str, bool] | None) -> None:
        monkeypatch.setattr(tvm, "get_global_func", lambda asked: {name: lambda: values}[asked])

    features_of(present)
    target = cpu.target()
    assert target["mattr"] == ["-avx512f", "-avx512vl"]  # no amx-tile: that name never has it
    features = codegen.llvm_get_cpu_features(tvm.target.Target(target))
    assert {"avx2", "fma"} <= set(features)
    assert not {"avx512f", "avx512vl"} & set(features)
    for nothing_hidden in ({"avx2": True}, None):  # None: LLVM cannot tell on this machine
        features_of(nothing_hidden)
        assert cpu.target() == {"kind": "llvm", "mcpu": "skylake-avx512"}


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000", 8),
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("200000 100000", 2),
        ("200001 100000", 3),
        ("1000 100000", 1),
        ("5000000 100000", 8),
        ("400000 50000\n", 8),
        ("300000 100000\n", 3),
        # Not what a kernel writes; never a crash.
        ("", 8),
        ("max", 8),
        ("100000", 8),
        ("1 2 3", 8),
        ("x 100000", 8),
        ("100000 0", 8),
        ("\xff\xff", 8),
    ],
)
def test_usable_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    file = tmp_path / "cpu.max"
    file.write_bytes(quota.encode("latin-1"))
    assert usable_cpus(file) == expected


def test_usable_cpus_without_a_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert usable_cpus(tmp_path / "no-such-file") == 3
    assert usable_cpus(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cpus(tmp_path / "no-such-file") == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus(tmp_path / "no-such-file") == 1


def test_usable_cpus_here() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)


def no_gpu() -> SimpleNamespace:
    return SimpleNamespace(exist=False)


def test_the_cuda_target_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm, "cuda", no_gpu)
    monkeypatch.delenv("DLIGHT_CUDA_ARCH", raising=False)
    target = tvm.target.Target(get_backend("cuda").target())
    assert (target.kind.name, target.attrs["arch"]) == ("cuda", cuda.DEFAULT_ARCH)
    assert target.host.kind.name == "llvm"


def test_the_cuda_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLIGHT_CUDA_ARCH", raising=False)
    monkeypatch.setattr(tvm, "cuda", lambda: SimpleNamespace(exist=True, compute_version="8.6"))
    assert cuda.target()["arch"] == "sm_86"
    monkeypatch.setenv("DLIGHT_CUDA_ARCH", "sm_75")
    assert cuda.target()["arch"] == "sm_75"
    monkeypatch.setattr(tvm, "cuda", no_gpu)
    assert cuda.target()["arch"] == "sm_75"


def test_no_such_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm, "cuda", no_gpu)
    with pytest.raises(BackendError, match=r"^backend 'cuda': this machine has no such device"):
        get_backend("cuda").device()


def test_an_existing_device() -> None:
    device = tvm.cpu()
    assert existing_device("cpu", device) == device
