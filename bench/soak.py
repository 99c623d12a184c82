"""`make soak`: a server under mixed load for a while; is its memory the same afterwards?

    python -m bench.soak --minutes 20 --json bench/results/soak.json

A real server in its own process; requests of every kind, some cut off, some wrong, and a library
loaded and unloaded now and then. Fails if resident memory grows by 3% or more after the warm-up
(the first fifth), if a thread or an asyncio task is left over, or if an answer is not what it
should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from serve.bench import environment

WORDS = (files("serve") / "data" / "gettysburg.txt").read_text(encoding="utf-8").split(" ")
CLIENTS = 8
SAMPLE_SECONDS = 2.0
MAX_GROWTH = 1.03
IDLE = ("dlight_running_sequences", "dlight_waiting_sequences", "dlight_kv_pages_used")


@dataclass
class Samples:
    """One process's resident bytes over time, and its threads when idle, before and after."""

    name: str
    pid: int
    resident: list[int] = field(default_factory=list)
    idle_threads: list[int] = field(default_factory=list)

    def take(self) -> None:
        self.resident.append(4096 * int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]))

    def count_threads(self) -> None:
        self.idle_threads.append(len(list(Path(f"/proc/{self.pid}/task").iterdir())))

    def report(self) -> dict[str, Any]:
        tenth = max(1, len(self.resident) // 10)
        before = median(self.resident[2 * tenth : 3 * tenth])
        after = median(self.resident[-tenth:])
        return {
            "process": self.name,
            "resident_mib_after_warm_up": round(before / 2**20, 1),
            "resident_mib_at_the_end": round(after / 2**20, 1),
            "growth": round(after / before, 4),
            "idle_threads": self.idle_threads,
        }


class Load:
    """Requests in a random order; `answers` counts them by kind and status."""

    def __init__(self, client: httpx.AsyncClient, expected: dict[int, str]) -> None:
        self._client, self._expected = client, expected
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, seed: int, deadline: float) -> None:
        chance = random.Random(seed)
        kinds = [self.recite, self.stream, self.cut, self.many, self.sampled, self.wrong_request]
        while time.monotonic() < deadline:
            kind = chance.choice(kinds)
            status = await kind(chance)
            self.answers[f"{kind.__name__} {status}"] += 1
            await asyncio.sleep(chance.uniform(0, 0.05))

    async def recite(self, chance: random.Random) -> int:
        number = chance.choice(list(self._expected))
        answer = await self._post(body(number))
        if answer.status_code == 200 and text(answer) != self._expected[number]:
            self.wrong.append(answer.text)
        return answer.status_code

    async def stream(self, chance: random.Random, cut_after: float = float("inf")) -> int:
        number, begun = chance.choice(list(self._expected)), time.monotonic()
        pieces: list[str] = []
        async with self._client.stream(
            "POST", "/v1/completions", json=body(number) | {"stream": True}
        ) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    pieces += [choice["text"] for choice in chunk["choices"]]
                if time.monotonic() - begun > cut_after:
                    return 0
        if "".join(pieces) != self._expected[number]:
            self.wrong.append("".join(pieces))
        return response.status_code

    async def cut(self, chance: random.Random) -> int:
        return await self.stream(chance, cut_after=chance.uniform(0, 0.1))

    async def many(self, chance: random.Random) -> int:
        prompts = [" ".join(WORDS[: chance.randint(1, 60)]) for _ in range(3)]
        fields: dict[str, Any] = {
            "prompt": prompts,
            "n": 2,
            "logprobs": 2,
            "echo": True,
            "temperature": 1.0,
        }
        return (await self._post(body(0) | fields)).status_code

    async def sampled(self, chance: random.Random) -> int:
        fields: dict[str, Any] = {
            "temperature": 0.9,
            "top_p": 0.9,
            "seed": chance.randrange(99),
            "stop": ["."],
        }
        return (await self._post(body(1) | fields)).status_code

    async def wrong_request(self, chance: random.Random) -> int:
        fields: dict[str, Any] = chance.choice(
            [{"model": "x"}, {"max_tokens": 10**6}, {"prompt": []}, {"x": 1}]
        )
        answer = await self._post(body(0) | fields)
        if answer.status_code not in (400, 404):
            self.wrong.append(answer.text)
        return answer.status_code

    async def reload(self, deadline: float) -> None:
        """A library comes and goes, once in a while."""
        while time.monotonic() < deadline:
            for action in ("load", "unload"):
                answer = await self._client.post(
                    f"/admin/models/{action}", json={"profile": "gemv", "wait": True}
                )
                self.answers[f"{action} {answer.status_code}"] += 1
                await asyncio.sleep(10)

    async def _post(self, fields: dict[str, Any]) -> httpx.Response:
        return await self._client.post("/v1/completions", json=fields)


def body(number: int) -> dict[str, Any]:
    prompt = " ".join(WORDS[: 6 + 20 * number])
    return {"model": "gettysburg", "prompt": prompt, "max_tokens": 30 + number, "temperature": 0}


def text(answer: httpx.Response) -> str:
    found: str = answer.json()["choices"][0]["text"]
    return found


async def state(client: httpx.AsyncClient) -> dict[str, float]:
    """/metrics, each gauge summed over the engines."""
    found = re.findall(r"^(\w+)(?:\{[^}]*\})? (\S+)$", (await client.get("/metrics")).text, re.M)
    sums: dict[str, float] = {}
    for name, value in found:
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


async def settle(client: httpx.AsyncClient) -> dict[str, float]:
    """Wait until nothing runs; the metrics then."""
    async with asyncio.timeout(60):
        now = await state(client)
        while any(now[name] for name in IDLE):
            await asyncio.sleep(0.1)
            now = await state(client)
    await asyncio.sleep(2)
    return await state(client)


async def soak(url: str, pids: dict[str, int], seconds: float) -> dict[str, Any]:
    processes = [Samples(name, pid) for name, pid in pids.items()]
    timeout = httpx.Timeout(120)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, trust_env=False) as client:
        expected = {n: text(await client.post("/v1/completions", json=body(n))) for n in range(8)}
        load = Load(client, expected)
        before = await settle(client)
        for process in processes:
            process.count_threads()
        deadline = time.monotonic() + seconds
        tasks = [asyncio.create_task(load.run(seed, deadline)) for seed in range(CLIENTS)]
        tasks.append(asyncio.create_task(load.reload(deadline)))
        while not all(task.done() for task in tasks):
            for process in processes:
                process.take()
            await asyncio.wait(tasks, timeout=SAMPLE_SECONDS)
        for task in tasks:
            task.result()
        after = await settle(client)
        for process in processes:
            process.count_threads()
    return {
        "seconds": seconds,
        "answers": dict(sorted(load.answers.items())),
        "wrong_answers": load.wrong[:10],
        "processes": [process.report() for process in processes],
        "idle_tasks": [before["dlight_server_tasks"], after["dlight_server_tasks"]],
    }


def failures(report: dict[str, Any]) -> list[str]:
    found = []
    for process in report["processes"]:
        if process["growth"] >= MAX_GROWTH:
            found.append(f"{process['process']} has grown by {process['growth']:.1%}")
        first, last = process["idle_threads"]
        if last > first:
            found.append(f"{process['process']} has {last - first} threads more")
    if report["idle_tasks"][1] > report["idle_tasks"][0]:
        found.append(f"tasks are left over: {report['idle_tasks']}")
    if report["wrong_answers"]:
        found.append(f"wrong answers, such as {report['wrong_answers'][0]!r}")
    found += [f"{what}: {n}" for what, n in report["answers"].items() if what[-3] == "5"]
    return found


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    number, minutes = sum(report["answers"].values()), report["seconds"] / 60
    lines = [
        f"{number} requests in {minutes:g} minutes, {len(report['wrong_answers'])} wrong answers:",
        "",
        "| process | after warm-up, MiB | at the end, MiB | growth | threads when idle |",
        "|---|---|---|---|---|",
    ]
    for process in report["processes"]:
        before, after = process["idle_threads"]
        lines.append(
            f"| {process['process']} | {process['resident_mib_after_warm_up']} | "
            f"{process['resident_mib_at_the_end']} | {process['growth'] - 1:+.1%} | "
            f"{before}, then {after} |"
        )
    return "\n".join((*lines, ""))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    command = [sys.executable, "-m", "serve.cli", "run", "--port", "0", "--set"]
    server = subprocess.Popen(
        [*command, "server.log_level=warning"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    try:
        url = next(m[1] for line in server.stdout if (m := re.search(r" at (http://\S+)", line)))
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        pids = {"front": server.pid, "engines": int(children[0])}
        report = asyncio.run(soak(url, pids, 60 * options.minutes))
    finally:
        server.send_signal(signal.SIGTERM)
        server.stdout.close()
        server.wait(60)
    report |= environment()
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    problems = failures(report)
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
