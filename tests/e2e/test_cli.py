"""The command line: what works, and what it says where something is wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

Command = Callable[..., subprocess.CompletedProcess[str]]
SHIPPED = ("baseline", "matmul", "gemv", "reduction", "full", "stock")


def test_profiles_list(command: Command) -> None:
    done = command("profiles", "list")
    assert done.returncode == 0
    for name in SHIPPED:
        assert f"{name}: " in done.stdout
    assert "dl.gpu.Matmul, dl.gpu.Fallback" in done.stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    line = f"{sys.executable} -m serve.cli profiles list | head -1"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("baseline: ")
    assert done.stderr == ""


def test_profiles_show(command: Command, tmp_path: Path) -> None:
    arguments = ("profiles", "show", "gemv", "--cache-dir", str(tmp_path))
    assert "not compiled yet" in command(*arguments).stdout
    compiled = command("compile", "--profile", "gemv", "--cache-dir", str(tmp_path))
    assert compiled.returncode == 0, compiled.stderr
    assert "[6/6] link" in compiled.stdout
    shown = command(*arguments).stdout
    assert "vectors = 0 (of 0, 1, 2, 3, 4, 6)" in shown
    assert "-> cpu.gemv   [decode]" in shown
    assert "layer_norm -> none" in shown


def test_bench(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    workload = ("--prompt-tokens", "20", "--decode-tokens", "3", "--repetitions", "2")
    profiles = ("--profile", "baseline", "--profile", "full")
    for batch in ("1", "3"):
        arguments = (*workload, *profiles, "--batch", batch, "--json", str(file))
        done = command("bench", *arguments)
        assert done.returncode == 0, done.stderr
        report = json.loads(file.read_text())
        assert [result["profile"] for result in report["results"]] == ["baseline", "full"]
        for result in report["results"]:
            assert result["prefill_tokens_per_second"] > 0
            assert result["decode_tokens_per_second"] > 0
            assert result["repetitions"] == 2
            assert result["max_logit_difference"] <= 2e-4
        assert report["results"][0]["decode_speedup"] == 1
        assert {"machine", "versions", "commit", "workload"} <= report.keys()
    assert done.stdout.splitlines()[-1].split()[0] == "full"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "--model", "bundled:moby"], ["bundled:moby", "gettysburg"]),
        (["run", "--model", "./nowhere"], ["./nowhere", "no such folder"]),
        (["run", "--backend", "tpu"], ["tpu", "cpu, cuda"]),
        (["run", "--set", "library.mcpu=i386x"], ["LLVM knows no mcpu 'i386x'"]),
        (["run", "--set", "library.mattr=avx2"], ["mattr 'avx2'", "as in +avx2"]),
        (
            ["run", "--backend", "cuda", "--set", "library.mcpu=haswell"],
            ["backend 'cuda' has no mcpu"],
        ),
        (["run", "--profile", "fastest"], ["fastest", "no such profile", *SHIPPED]),
        (["run", "--port", "http"], ["server.port", "'http'", "integer"]),
        (["run", "--set", "engine.max_runing=3"], ["engine.max_runing", "max_running"]),
        (
            ["run", "--set", "engine.max_running=0"],
            ["engine.max_running = 0", "equal to 1"],
        ),
        (["run", "--set", "server.host"], ["--set", "SECTION.KEY=VALUE"]),
        (["run", "--config", "missing.toml"], ["missing.toml"]),
        (["bench", "--batch", "0"], ["--batch", "at least 1"]),
        (["bench", "--json", "/dev/null/x.json"], ["--json", "/dev/null/x.json", "writable"]),
        (["bench", "--prompt-tokens", "1000", "--decode-tokens", "25"], ["1024"]),
        (["trace", "--decode-tokens", "0"], ["--decode-tokens", "at least 1"]),
        (["trace", "--json", "/dev/null/x.json"], ["--json", "/dev/null/x.json", "writable"]),
        (["trace", "--profile", "fastest"], ["fastest", "no such profile", *SHIPPED]),
    ],
)
def test_errors(command: Command, arguments: list[str], told: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for words in told:
        assert words in done.stderr


def test_a_taken_port_is_told_at_once(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("run", "--port", str(port))
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "compiling" not in done.stdout


def test_serve_toml_is_read(command: Command, tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('[library]\nprofile = "fastest"\n')
    assert "fastest" in command("run", cwd=tmp_path).stderr
    (tmp_path / "serve.toml").write_text('[server]\nport = "8000"\n')
    assert "serve.toml: server.port = '8000'" in command("run", cwd=tmp_path).stderr
    (tmp_path / "serve.toml").write_text("[servr]\nport = 1\n")
    assert "servr" in command("run", cwd=tmp_path).stderr


def test_sigterm_ends_the_compiler_too(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.cli", "compile", "--cache-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert "[1/6]" in process.stdout.readline()  # the child is at work
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not list((tmp_path / "libraries").glob(".building-*"))
