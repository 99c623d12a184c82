"""Get a library: from the cache, or by a child process that compiles it. Never loads it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tvm

from profiles import Profile
from serve.backends import Backend
from serve.compiler.cache import LibraryCache
from serve.compiler.library import Library
from serve.compiler.pipeline import PHASES, PIPELINE_VERSION
from serve.errors import CompileError
from serve.model.config import GPT2Config

OnProgress = Callable[[str], None]
LOG_LINES = 40  # of the compiler's output, in an error
# As Python, LLVM and the linker all put it.
_NO_ROOM = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
_NO_ROOM.append(str(signal.strsignal(signal.SIGXFSZ)))


@dataclass(frozen=True)
class CompileJob:
    """A model, a backend and a profile: what a library is made from."""

    config: GPT2Config
    backend: Backend
    profile: Profile

    def request(self) -> dict[str, Any]:
        """Everything that decides the library's content, and its key: the sha256 over the rest."""
        backend, profile = self.backend, self.profile
        rules = profile.rules_for(backend.name, backend.family)
        content = {
            "model_config": self.config.as_dict(),
            "backend": backend.name,
            "target": dict(backend.target()),
            "dtype": backend.dtype,
            "profile": profile.name,
            "profile_digest": profile.digest(backend.name, backend.family),
            "rules": [{"id": use.rule.id, "parameters": dict(use.values)} for use in rules],
            "kv_cache": "pages" if any(use.rule.kv_pages for use in rules) else "tvm",
            "pipeline_version": PIPELINE_VERSION,
            "tvm_version": tvm.__version__,
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(canonical.encode()).hexdigest()
        return content | {"key": key, "profile_source": profile.source}


@dataclass(frozen=True)
class Compiled:
    """A library and where it came from; `seconds` is the time it took to get it."""

    library: Library
    source: Literal["cache", "compiled"]
    seconds: float


def get_library(
    job: CompileJob,
    cache: LibraryCache,
    on_progress: OnProgress = lambda _: None,
    time_limit_seconds: float = 1800.0,
) -> Compiled:
    """The job's library, compiled if the cache has none.

    Two processes that ask at once compile once.

    Raises CompileError with the compiler's log if it fails, crashes or takes longer than the limit,
    and LibraryError if the cache cannot be written.
    """
    start = time.perf_counter()
    request = job.request()
    key = request["key"]
    found = cache.find(key)
    if found is not None:
        return Compiled(found, "cache", time.perf_counter() - start)

    def on_wait() -> None:
        on_progress("waiting for another process that compiles the same library")

    with cache.lock(key, on_wait):
        found = cache.find(key)
        if found is not None:
            return Compiled(found, "cache", time.perf_counter() - start)

        def build(folder: Path) -> None:
            compile_in_child(request | {"folder": str(folder)}, on_progress, time_limit_seconds)

        library = cache.store(key, build)
    return Compiled(library, "compiled", time.perf_counter() - start)


def compile_in_child(
    request: dict[str, Any], on_progress: OnProgress, time_limit_seconds: float
) -> None:
    """Run the pipeline in a child process, passing its phases on.

    All that it writes is in the request's folder, so that nothing else can be full.
    """
    folder = request["folder"]
    path = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.Popen(
        [sys.executable, "-m", "serve.compiler.pipeline"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, to be stopped with its linker or nvcc
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": folder},
    )
    assert child.stdout is not None
    assert child.stderr is not None
    log: deque[str] = deque(maxlen=LOG_LINES)
    reader = threading.Thread(target=log.extend, args=(child.stderr,))
    watcher = threading.Thread(target=_outlive, args=(child,))
    expired = threading.Event()

    def expire() -> None:
        if child.poll() is None:  # or it ended by itself
            expired.set()
            _stop(child)

    timer = threading.Timer(time_limit_seconds, expire)
    reader.start()
    watcher.start()
    timer.start()
    try:
        _send(child, request)
        for line in child.stdout:
            _pass_on(line, on_progress)
        code = child.wait()
    finally:
        timer.cancel()
        _stop(child)
        watcher.join()
        reader.join()
        child.stdout.close()
        child.stderr.close()
    if code != 0:
        what = f"profile {request['profile']!r} on backend {request['backend']!r}"
        text = "".join(log)
        limit = f"took longer than {time_limit_seconds:g} s and was stopped"
        cause = limit if expired.is_set() else _cause(code, text, Path(folder).parent)
        raise CompileError(f"compiling {what} {cause}", text)


def _stop(child: subprocess.Popen[str]) -> None:
    """Kill it and all that it has started, even if it is dead itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _outlive(child: subprocess.Popen[str]) -> None:
    """What it leaves behind, such as its linker, would keep the pipes open."""
    child.wait()
    _stop(child)


def _send(child: subprocess.Popen[str], request: dict[str, Any]) -> None:
    assert child.stdin is not None
    try:
        with child.stdin:
            json.dump(request, child.stdin)
    except BrokenPipeError:
        return  # it died before it read: its exit code and log say why


def _pass_on(line: str, on_progress: OnProgress) -> None:
    try:
        number = PHASES.index(json.loads(line)["phase"]) + 1
    except (ValueError, TypeError, KeyError):
        return  # something else that was printed
    on_progress(f"[{number}/{len(PHASES)}] {PHASES[number - 1]}")


def _cause(code: int, log: str, cache: Path) -> str:
    no_room = next((problem for problem in _NO_ROOM if problem in log), None)
    if no_room is not None:
        return f"failed: {no_room}: {cache}"
    return f"crashed with {signal.Signals(-code).name}" if code < 0 else "failed"
