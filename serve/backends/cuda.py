"""The CUDA backend: NVIDIA GPUs, compiled by nvcc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import tvm

from serve.backends.backend import Backend, existing_device

DEFAULT_ARCH = "sm_90a"


def target() -> Mapping[str, Any]:
    """For the device's architecture, or DLIGHT_CUDA_ARCH to compile for another machine."""
    arch = os.environ.get("DLIGHT_CUDA_ARCH")
    device = tvm.cuda()
    if arch is None and device.exist:
        arch = "sm_" + device.compute_version.replace(".", "")
    return {
        "kind": "cuda",
        "arch": arch or DEFAULT_ARCH,
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 49152,
        "thread_warp_size": 32,
        "host": {"kind": "llvm"},
    }


CUDA = Backend("cuda", "gpu", target, lambda: existing_device("cuda", tvm.cuda()))
