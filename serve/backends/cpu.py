"""The CPU backend: LLVM for the processor this runs on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm.target import codegen

from serve.backends.backend import Backend


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


CPU = Backend("cpu", "cpu", target, tvm.cpu)
