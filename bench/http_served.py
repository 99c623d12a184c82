"""What HTTP costs a real model: `dlight-serve run` beside its engine alone, interleaved.

`python -m bench.http_served` writes bench/results/http-served.json. Both have the same library; the
engine alone runs in this process, its streams read in the event loop, without text or HTTP. The
server is asked from here, over loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from serve.bench import environment
from serve.config import Settings, load_settings
from serve.engine import Engine, SamplingParams
from serve.loading import Loader
from serve.placement import LoadRequest, Placement

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "http-served.json"
CONCURRENCIES = (1, 16, 64)
PROMPT_TOKENS, NEW_TOKENS = 322, 64
SETTINGS = {
    "model.source": "synthetic:gpt2",
    "library.profile": "full",
    "runner.max_batch": "64",
    "runner.kv_tokens": str(64 * 400),
    "engine.max_running": "64",
    "engine.prefix_sharing": "false",
}
LAST_CHUNK = b"\r\n0\r\n\r\n"


def prompts(concurrency: int, seed: int) -> list[list[int]]:
    """No two alike, from the first token on."""
    return [
        [(7919 * seed + 131 * n + 31 * k) % 50000 for k in range(PROMPT_TOKENS)]
        for n in range(concurrency)
    ]


async def directly(engine: Engine, concurrency: int, seed: int) -> float:
    """Tokens per second."""

    async def one(prompt: Sequence[int]) -> None:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)
        async for _ in engine.submit(prompt, params):
            pass

    start = time.perf_counter()
    await asyncio.gather(*map(one, prompts(concurrency, seed)))
    return concurrency * NEW_TOKENS / (time.perf_counter() - start)


async def over_http(port: int, concurrency: int, seed: int) -> float:
    """Tokens per second."""

    async def one(prompt: Sequence[int]) -> None:
        fields = {"model": "synthetic-gpt2", "prompt": prompt, "max_tokens": NEW_TOKENS}
        body = json.dumps({**fields, "temperature": 0, "ignore_eos": True, "stream": True})
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        end = b""
        while not end.endswith(LAST_CHUNK):
            read = await reader.read(1 << 18)
            assert read, "the server has closed the connection"
            end = (end + read)[-len(LAST_CHUNK) :]
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*map(one, prompts(concurrency, seed)))
    return concurrency * NEW_TOKENS / (time.perf_counter() - start)


async def measure(
    settings: Settings, port: int, repetitions: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    prepared = Loader().prepare(LoadRequest(settings, Placement("cpu", "full")), say)
    engine = Engine(prepared.runner, prepared.config)
    engine.start()
    results = []
    for concurrency in CONCURRENCIES:
        rates: dict[str, list[float]] = {"direct": [], "http": []}
        for seed in range(-1, repetitions):  # the first round warms up
            direct = await directly(engine, concurrency, seed)
            http = await over_http(port, concurrency, seed)
            if seed >= 0:
                rates["direct"].append(direct)
                rates["http"].append(http)
            say(f"{concurrency}: directly {direct:.1f}, over HTTP {http:.1f} tokens/s")
        ratios = [h / d for h, d in zip(rates["http"], rates["direct"], strict=True)]
        results.append(
            {"concurrency": concurrency, **rates, "ratio": median(ratios), "ratios": ratios}
        )
    await engine.drain(0)
    return results


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| streams | directly, tok/s | over HTTP, tok/s | ratio | (min-max) |"]
    lines.append("|---|---|---|---|---|")
    for result in report["results"]:
        ratios = result["ratios"]
        lines.append(
            f"| {result['concurrency']} | {median(result['direct']):.1f} | "
            f"{median(result['http']):.1f} | {result['ratio']:.3f} | "
            f"({min(ratios):.3f}-{max(ratios):.3f}) |"
        )
    return "\n".join((*lines, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parsed = parser.parse_args()
    settings = load_settings(flags=SETTINGS)
    flags = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "serve.cli", "run", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = next(line for line in server.stdout if " at http" in line)
            port = int(line.rstrip().rpartition(":")[2])
            results = asyncio.run(measure(settings, port, parsed.repetitions, print))
        finally:
            server.terminate()
            server.wait(60)
    workload = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "settings": SETTINGS}
    report = {"workload": workload, "results": results, **environment()}
    parsed.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
