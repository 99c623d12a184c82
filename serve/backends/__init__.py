"""Named choices of TVM target, device and dtype."""

from serve.backends.backend import Backend
from serve.backends.cpu import CPU, cpu_ids, cpu_named, usable_cpus
from serve.backends.cuda import CUDA
from serve.errors import BackendError

BACKENDS = {backend.name: backend for backend in (CPU, CUDA)}


def get_backend(name: str, mcpu: str | None = None, mattr: str | None = None) -> Backend:
    """A backend by name; mcpu and mattr as in serve.backends.cpu.cpu_named.

    Raises BackendError naming the known ones.
    """
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if mcpu is None and mattr is None:
        return BACKENDS[name]
    if name != CPU.name:
        raise BackendError(f"backend {name!r} has no mcpu and no mattr: they are the CPU's")
    return cpu_named(mcpu, mattr)


__all__ = ["BACKENDS", "Backend", "cpu_ids", "cpu_named", "get_backend", "usable_cpus"]
