"""The driver's side of a worker: start it, ask it, halt it while others run, end it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 10.0  # seconds for a worker to end by itself
LOG_LINES = 15  # of a worker that failed, in the error


class WorkerError(Exception):
    """The worker crashed, hung, or raised; `str()` says how, and what it printed last."""


class NotInstalledError(Exception):
    """The engine, or the interpreter it should run in, is not there."""


class WorkerProcess:
    """One engine in its own process group, halted whenever it is not asked anything.

    engine: a module of bench.peers.engines, or a dotted one. log: where all it prints goes.
    Raises NotInstalledError if the interpreter is not there.
    """

    def __init__(
        self, engine: str, python: str, threads: int, log: Path, env: Mapping[str, str] = os.environ
    ) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            try:
                self._process = subprocess.Popen(
                    [python, "-m", "bench.peers.worker", engine],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    cwd=ROOT,
                    env={**env, **environment(threads)},
                    start_new_session=True,
                )
            except OSError as error:
                raise NotInstalledError(f"{python}: {error.strerror}") from None
        self._received = b""
        self._ended = False

    @property
    def process_id(self) -> int:
        return self._process.pid

    def ask(self, operation: str, timeout: float = 600.0, **request: Any) -> Any:
        """Let it run, wait for its reply, halt it. Raises WorkerError, NotInstalledError."""
        self._signal(signal.SIGCONT)
        reply = self._exchange({"op": operation} | request, time.monotonic() + timeout)
        self._signal(signal.SIGSTOP)
        if "missing" in reply:
            raise NotInstalledError(reply["missing"])
        if "error" in reply:
            raise WorkerError(reply["error"].strip())
        return reply["ok"]

    def close(self) -> None:
        """End it, politely first; safe after a failure, and twice."""
        with suppress(WorkerError, subprocess.TimeoutExpired):
            if self._process.poll() is None:
                self._signal(signal.SIGCONT)
                self._exchange({"op": "stop"}, time.monotonic() + PATIENCE)
                self._process.wait(PATIENCE)
        self._kill()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # a broken pipe, or closed after an earlier failure
            self._fail("it ended")
        reply: dict[str, Any] = json.loads(self._line(request["op"], deadline))
        return reply

    def _line(self, operation: str, deadline: float) -> bytes:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        while b"\n" not in self._received:
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"no answer to {operation!r} in time")
            data = os.read(output, 1 << 20)
            if not data:
                self._fail("it ended")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _fail(self, what: str) -> None:
        self._kill()
        code = self._process.returncode
        tail = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        raise WorkerError("\n".join([f"{what} (exit code {code})", *tail]))

    def _kill(self) -> None:
        """The whole group: engines start processes of their own. Once: the id may be reused."""
        if self._ended:
            return
        self._ended = True
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def environment(threads: int) -> dict[str, str]:
    """For every engine alike: its threads, our modules, and no network."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(counts, str(threads)) | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "default",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }


DEFAULT_PYTHON = sys.executable
