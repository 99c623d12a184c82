"""Named choices of TVM target, device and dtype."""

from serve.backends.backend import Backend
from serve.backends.cpu import CPU, cpu_ids, usable_cpus
from serve.backends.cuda import CUDA
from serve.errors import BackendError

BACKENDS = {backend.name: backend for backend in (CPU, CUDA)}


def get_backend(name: str) -> Backend:
    """Raises BackendError naming the known ones."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]


__all__ = ["BACKENDS", "Backend", "cpu_ids", "get_backend", "usable_cpus"]
