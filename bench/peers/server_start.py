"""How long our server takes from its command to /ready, libraries and weights being there."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from bench.peers.process import ROOT

POLL_SECONDS = 0.005


def start_seconds(folder: Path, options: Mapping[str, str], timeout: float = 300.0) -> float:
    """Start `dlight-serve run` on the model in `folder`, wait for 200 from /ready, end it.

    Raises RuntimeError with its output if it ends before, TimeoutError if it takes longer.
    """
    settings = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "serve.cli", "run", "--model", str(folder), "--port", "0"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,  # where no serve.toml is
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    try:
        port = _port(process)
        while not _is_ready(port):
            if time.perf_counter() - start > timeout:
                raise TimeoutError(f"not ready after {timeout} s")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        found = re.search(r" at http://127\.0\.0\.1:(\d+)", line)
        if found:
            return int(found[1])
    raise RuntimeError(f"the server ended: {''.join(output)}")


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
