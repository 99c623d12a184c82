"""What HTTP costs: tokens per second streamed over it, and read from the same engine directly.

`python -m bench.http` writes bench/results/http.json. The model computes nothing, so both figures
are upper bounds: no server on this machine can stream faster, whatever its kernels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from bench.http_server import REQUEST_TOKENS, WORKLOAD_TOKENS
from serve.bench import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "http.json"
CONCURRENCIES = (1, 16, 64)
PROFILED_CONCURRENCY = 16
PROFILED_TOKENS = 4 * WORKLOAD_TOKENS
SERVER = [sys.executable, "-m", "bench.http_server"]
LAST_CHUNK = b"\r\n0\r\n\r\n"

Report = Mapping[str, Any]


# -- the client: bytes in and out, for it has the other processor only


def _request(host: str) -> bytes:
    body = json.dumps(
        {
            "model": "instant",
            "prompt": "Four score and",
            "max_tokens": REQUEST_TOKENS,
            "temperature": 0,
            "stream": True,
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def _client(port: int, num_requests: int) -> int:
    """Requests one after the other on one connection; the number of events that came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request, num_events = _request(f"127.0.0.1:{port}"), 0
    for _ in range(num_requests):
        writer.write(request)
        end = b""
        while not end.endswith(LAST_CHUNK):
            read = await reader.read(1 << 18)
            assert read, "the server has closed the connection"
            num_events += read.count(b"data: {")
            end = (end + read)[-len(LAST_CHUNK) :]
    writer.close()
    return num_events


async def _clients(port: int, concurrency: int, num_requests: int) -> dict[str, float]:
    await _client(port, 1)
    start = time.perf_counter()
    events = await asyncio.gather(*(_client(port, num_requests) for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    num_tokens = concurrency * num_requests * REQUEST_TOKENS
    return {
        "tokens_per_second": num_tokens / seconds,
        "tokens_per_event": num_tokens / sum(events),
    }


# -- the measurements


@contextmanager
def _server(*arguments: str) -> Iterator[int]:
    """A server process; its port."""
    with subprocess.Popen([*SERVER, "serve", *arguments], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _over_http(
    concurrency: int, *arguments: str, num_tokens: int = WORKLOAD_TOKENS
) -> dict[str, float]:
    num_requests = num_tokens // REQUEST_TOKENS // concurrency
    with _server(*arguments) as port:
        return uvloop.run(_clients(port, concurrency, num_requests))


def _directly(concurrency: int) -> float:
    command = [*SERVER, "direct", str(concurrency)]
    return float(subprocess.run(command, capture_output=True, check=True).stdout)


def _spread(rates: Sequence[float]) -> dict[str, float]:
    return {"median": median(rates), "min": min(rates), "max": max(rates)}


def measure(concurrency: int, repetitions: int) -> dict[str, Any]:
    """Interleaved: what the machine does meanwhile falls on both alike."""
    direct, over_http = [], []
    for _ in range(repetitions):
        direct.append(_directly(concurrency))
        over_http.append(_over_http(concurrency))
    return {
        "concurrency": concurrency,
        "direct": _spread(direct),
        "http": _spread([run["tokens_per_second"] for run in over_http]),
        "tokens_per_event": median(run["tokens_per_event"] for run in over_http),
    }


def profile() -> dict[str, Any]:
    """Of the event loop's thread. The profiler slows it down, so only the shares mean something."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        _over_http(PROFILED_CONCURRENCY, str(file), num_tokens=PROFILED_TOKENS)
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {"concurrency": PROFILED_CONCURRENCY, **report}


def run(repetitions: int, file: Path, say: Callable[[str], None]) -> None:
    results = []
    for concurrency in CONCURRENCIES:
        results.append(measure(concurrency, repetitions))
        say(json.dumps(results[-1]))
    workload = {
        "tokens": WORKLOAD_TOKENS,
        "tokens_per_request": REQUEST_TOKENS,
        "repetitions": repetitions,
    }
    report = {"workload": workload, "results": results, "profile": profile(), **environment()}
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


# -- for the docs


def table(report: Report) -> str:
    """Markdown: throughput, then where the loop's thread is."""
    lines = [
        "| streams | directly, tok/s | over HTTP, tok/s | (min-max) | more a token | tok/event |",
        "|---|---|---|---|---|---|",
    ]
    for result in report["results"]:
        direct, over = result["direct"]["median"], result["http"]
        spread = f"({over['min']:.0f}-{over['max']:.0f})"
        more = 1e6 / over["median"] - 1e6 / direct
        lines.append(
            f"| {result['concurrency']} | {direct:.0f} | {over['median']:.0f} | {spread} | "
            f"{more:.1f} µs | {result['tokens_per_event']:.2f} |"
        )
    lines += ["", "| function | calls | own time |", "|---|---|---|"]
    total = report["profile"]["seconds"]
    for found in report["profile"]["functions"]:
        share = f"{found['seconds'] / total:.1%}"
        lines.append(f"| `{found['function']}` | {found['calls']} | {share} |")
    return "\n".join((*lines, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    run(parsed.repetitions, parsed.json, print)


if __name__ == "__main__":
    main()
