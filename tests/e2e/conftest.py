"""The real server in its own process, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import httpx
import pytest

PATIENCE = 120.0  # seconds; a test that needs them has failed


class ServerProcess:
    """`dlight-serve run` on a free port; `output` is what it has printed."""

    def __init__(self, *arguments: str, cache: Path, cwd: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli", "run", "--port", "0", *arguments],
            env=os.environ | {"DLIGHT_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
        )
        self.output: list[str] = []
        self._started = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._started.wait(PATIENCE)
        found = re.search(r" at (http://\S+)", "".join(self.output))
        if found is None:
            self._process.kill()
            self.wait()
            raise RuntimeError(f"it did not start: {''.join(self.output)}")
        self.url = found[1]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line)
            if "startup complete" in line:
                self._started.set()
        self._started.set()  # it has ended

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: str) -> None:
        """Until a line of its output has it."""
        deadline = time.monotonic() + PATIENCE
        while not any(re.search(pattern, line) for line in list(self.output)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {''.join(self.output)}"
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        code = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        self.wait()


StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def start_server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    def start(*arguments: str) -> ServerProcess:
        return ServerProcess(*arguments, cache=cache, cwd=tmp_path_factory.mktemp("cwd"))

    return start


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Iterator[ServerProcess]:
    """The default: the bundled model under the full profile."""
    with start_server() as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def command(cache: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `dlight-serve` with these arguments to its end."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serve.cli", *arguments],
            env=os.environ | {"DLIGHT_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            cwd=cwd,
            check=False,
        )

    return run
