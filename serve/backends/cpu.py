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
    """Without `mcpu` TVM would compile for the oldest x86-64: no AVX at all."""
    return {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}


def usable_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs this process may really use: its affinity, and its cgroup's quota rounded up."""
    try:
        available = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        available = os.cpu_count() or 1
    try:
        quota, period = quota_file.read_text().split()
    except (OSError, ValueError):
        return available
    if quota == "max":
        return available
    return max(1, min(available, -(-int(quota) // int(period))))


CPU = Backend("cpu", "cpu", target, tvm.cpu)
