"""Backends: the known ones, their targets, what this machine lacks. Needs TVM; compiles nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tvm
from tvm.target import codegen

from serve import placement
from serve.backends import BACKENDS, cpu, cuda, get_backend, usable_cpus
from serve.backends.backend import existing_device
from serve.errors import BackendError

pytestmark = pytest.mark.compiler


def test_the_known_backends() -> None:
    families = {name: get_backend(name).family for name in BACKENDS}
    assert families == placement.BACKENDS == {"cpu": "cpu", "cuda": "gpu"}
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


IS_X86 = platform.machine() in ("x86_64", "AMD64")
only_x86 = pytest.mark.skipif(not IS_X86, reason="names of x86-64 processors")


def features_of(target: Mapping[str, Any]) -> set[str]:
    found: set[str] = codegen.llvm_get_cpu_features(tvm.target.Target(dict(target)))
    return found


@only_x86
@pytest.mark.parametrize("mcpu", ["haswell", "x86-64", "skylake-avx512"])
def test_another_processor(mcpu: str) -> None:
    backend = get_backend("cpu", mcpu)
    assert backend.target() == {"kind": "llvm", "mcpu": mcpu}
    assert ("avx2" in features_of(backend.target())) == (mcpu != "x86-64")
    assert (backend.name, backend.family, backend.dtype) == ("cpu", "cpu", "float32")
    assert backend.device().exist
    assert get_backend("cpu").target() != backend.target() or mcpu == codegen.llvm_get_system_cpu()


@only_x86
def test_other_features() -> None:
    backend = get_backend("cpu", "haswell", "+avx512f, -bmi2,")
    assert backend.target() == {
        "kind": "llvm",
        "mcpu": "haswell",
        "mattr": ["+avx512f", "-bmi2"],
    }
    features = features_of(backend.target())
    assert "avx512f" in features
    assert "bmi2" not in features


@only_x86
def test_other_features_of_this_processor() -> None:
    """Behind what this machine hides, so that they win."""
    own = dict(get_backend("cpu").target())
    found = get_backend("cpu", mattr="-avx2").target()
    assert found == own | {"mattr": [*own.get("mattr", []), "-avx2"]}
    assert "avx2" not in features_of(found)
    hidden = [name.removeprefix("-") for name in own.get("mattr", [])]
    for name in hidden:
        assert name in features_of(get_backend("cpu", mattr=f"+{name}").target())


@only_x86
def test_what_llvm_does_not_know() -> None:
    with pytest.raises(BackendError, match=r"^LLVM knows no mcpu 'hasswell'; it knows .*haswell"):
        get_backend("cpu", "hasswell")
    for mattr, feature in (("+avx2,-avx512", "avx512"), ("+AVX2", ""), ("avx2", ""), ("+", "")):
        with pytest.raises(BackendError, match=r"^mattr '.*': ") as caught:
            get_backend("cpu", mattr=mattr)
        expected = f"LLVM knows no feature '{feature}'" if feature else "expected a feature with +"
        assert expected in str(caught.value)


def test_only_the_cpu_has_them() -> None:
    for values in ({"mcpu": "haswell"}, {"mattr": "+avx2"}):
        with pytest.raises(BackendError, match=r"^backend 'cuda' has no mcpu and no mattr"):
            get_backend("cuda", **values)
    with pytest.raises(BackendError, match="unknown backend 'tpu'"):
        get_backend("tpu", "haswell")


def present(monkeypatch: pytest.MonkeyPatch, features: dict[str, bool] | None) -> None:
    """This processor has these features, and lacks those."""
    name = "tvm.codegen.llvm.GetHostCPUFeatures"
    monkeypatch.setattr(tvm, "get_global_func", lambda asked: {name: lambda: features}[asked])


@only_x86
def test_missing_features(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, {"avx2": True, "fma": True, "avx512f": False, "avx512bw": False})
    for target, missing in (
        ({"kind": "llvm", "mcpu": "haswell"}, []),
        ({"kind": "llvm", "mcpu": "skylake-avx512"}, ["avx512bw", "avx512f"]),
        ({"kind": "llvm", "mcpu": "skylake-avx512", "mattr": ["-avx512bw"]}, ["avx512f"]),
        ({"kind": "llvm", "mcpu": "haswell", "mattr": ["+avx512f"]}, ["avx512f"]),
        ({"kind": "cuda", "arch": "sm_80"}, []),
        ({}, []),
    ):
        assert cpu.missing_features(target) == missing
        assert get_backend("cpu").missing_features(target) == missing
        assert get_backend("cuda").missing_features(target) == []
    present(monkeypatch, None)  # LLVM cannot tell on this machine
    assert cpu.missing_features({"kind": "llvm", "mcpu": "sapphirerapids"}) == []


@only_x86
def test_nothing_is_missing_of_what_is_compiled_for_this_machine() -> None:
    assert cpu.missing_features(get_backend("cpu").target()) == []
    assert cpu.missing_features({"kind": "llvm", "mcpu": "x86-64"}) == []
    has_amx = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")().get("amx-tile")
    missing = cpu.missing_features({"kind": "llvm", "mcpu": "sapphirerapids"})
    assert ("amx-tile" in missing) == (not has_amx)


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
