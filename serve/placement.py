"""The engines' process from the front's side: how to start it, what to ask it for, what it tells.

Light to import: the front has no TVM.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.config import Settings
from serve.engine.remote import HostProcess

# Name -> family. What they are is in serve/backends, which has TVM.
BACKENDS: dict[str, Literal["cpu", "gpu"]] = {"cpu": "cpu", "cuda": "gpu"}


def start_host(settings: Settings) -> HostProcess:
    """Start serve/host.py, which takes a while to import what it needs."""
    server = settings.server
    command = (sys.executable, "-m", "serve.host", server.log_level, server.log_format)
    return HostProcess(command)


@dataclass(frozen=True, order=True)
class Placement:
    """A profile on a backend. Written `backend:profile`."""

    backend: str
    profile: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.profile}"

    @classmethod
    def parse(cls, text: str, default_backend: str) -> Placement:
        """From `profile` or `backend:profile`."""
        backend, colon, profile = text.rpartition(":")
        return cls(backend if colon else default_backend, profile)


@dataclass(frozen=True)
class LoadRequest:
    """What the engines' process is asked for."""

    settings: Settings
    placement: Placement


@dataclass(frozen=True)
class LibraryFacts:
    """What a loaded library is. `coverage`: which rule took which kernel, as in its manifest."""

    quantization: str
    digest: str
    tvm_version: str
    source: Literal["cache", "compiled"]
    compile_seconds: float
    coverage: Sequence[dict[str, Any]]
