"""The CPU backend: LLVM for the processor this runs on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm
from tvm.target import codegen

from serve.backends.backend import Backend
from serve.errors import BackendError

_LLVM = tvm.target.Target({"kind": "llvm"})


def cpu_named(mcpu: str | None = None, features: str | None = None) -> Backend:
    """The CPU backend, for another processor than this one, or with other features.

    mcpu: LLVM's name of it, such as "haswell"; features: such as "+avx2,-avx512f". Its libraries
    run where the features are. Raises BackendError for what LLVM does not know.
    """
    known = sorted(str(name) for name in codegen.llvm_get_cpu_archlist(_LLVM))
    if mcpu is not None and mcpu not in known:
        raise BackendError(f"LLVM knows no mcpu {mcpu!r}; it knows {', '.join(known)}")
    listed = [f.strip() for f in (features or "").split(",") if f.strip()]
    for feature in listed:
        if not re.fullmatch(r"[+-][a-z0-9][a-z0-9._-]*", feature):
            raise BackendError(f"mattr {feature!r}: expected a feature with + or -, as in +avx2")
        if not _is_known(feature[1:]):
            raise BackendError(f"mattr {feature!r}: LLVM knows no feature {feature[1:]!r}")

    def named() -> Mapping[str, Any]:
        own = target() if mcpu is None else {"kind": "llvm", "mcpu": mcpu}
        attributes = [*own.get("mattr", ()), *listed]
        return {**own, **({"mattr": attributes} if attributes else {})}

    return replace(CPU, target=named)


def _is_known(feature: str) -> bool:
    """LLVM ignores those it does not know, with a warning."""
    target = tvm.target.Target({"kind": "llvm", "mattr": [f"+{feature}"]})
    return bool(codegen.target_has_features([feature], target))


def missing_features(built_for: Mapping[str, Any]) -> list[str]:
    """What code for that target may use and this processor has not, by LLVM's names."""
    if built_for.get("kind") != "llvm":
        return []
    used = codegen.llvm_get_cpu_features(tvm.target.Target(dict(built_for)))
    return sorted({str(feature) for feature in used} & _absent_features())


def target() -> Mapping[str, Any]:
    """Without `mcpu` TVM would compile for the oldest x86-64: no AVX at all.

    A virtual machine may hide some of what a processor of that name has: `mattr` says which.
    """
    named = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}
    hidden = sorted(codegen.llvm_get_cpu_features(tvm.target.Target(named)) & _absent_features())
    return named | ({"mattr": [f"-{feature}" for feature in hidden]} if hidden else {})


def _absent_features() -> set[str]:
    """What this processor could have and has not, by LLVM's names."""
    features = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    return {str(name) for name, present in (features or {}).items() if not present}


def usable_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs this process may really use: its affinity, and its cgroup's quota rounded up."""
    available = len(cpu_ids())
    try:
        quota, period = (int(number) for number in quota_file.read_text().split())
        return max(1, min(available, -(-quota // period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no quota
        return available


def cpu_ids() -> list[int]:
    """The CPUs that the calling thread may run on."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return list(range(os.cpu_count() or 1))


CPU = Backend("cpu", "cpu", target, tvm.cpu, missing_features=missing_features)
