"""300 streams at once, half of them cut at random moments, slow readers among them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
from importlib.resources import files
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import PATIENCE, StartServer

pytestmark = pytest.mark.e2e

ADDRESS = (files("serve") / "data" / "gettysburg.txt").read_text(encoding="utf-8")
WORDS = ADDRESS.split(" ")
NUM_STREAMS = 300
NUM_BODIES = 30  # after which they repeat
KINDS = ("whole", "slow", "cut at once", "cut while queued", "cut after a token", "cut later")


def body(number: int) -> dict[str, Any]:
    """A beginning of the address, long enough to be computed in chunks, or short."""
    words = 6 + 97 * (number % 3)
    return {
        "model": "gettysburg",
        "prompt": " ".join(WORDS[:words]),
        "max_tokens": 40 + number % 30,
        "temperature": 0,
        "stream": True,
    }


async def whole(client: httpx.AsyncClient, number: int) -> str:
    answer = await client.post("/v1/completions", json=body(number) | {"stream": False})
    text: str = answer.raise_for_status().json()["choices"][0]["text"]
    return text


async def stream(client: httpx.AsyncClient, number: int, expected: str) -> None:
    """One client; those that stay to the end check the text."""
    kind, chance = KINDS[number % len(KINDS)], random.Random(number)
    text: list[str] = []

    async def read() -> None:
        async with client.stream("POST", "/v1/completions", json=body(number)) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text.extend(choice["text"] for choice in chunk["choices"])
                if kind == "slow":
                    await asyncio.sleep(0.02)
                if kind == "cut after a token" and text:
                    return
                if kind == "cut later" and len(text) > chance.randrange(1, 30):
                    return

    if kind in ("cut at once", "cut while queued"):
        seconds = 0.01 if kind == "cut at once" else chance.uniform(0.05, 2)
        with contextlib.suppress(TimeoutError):  # which is the cut
            async with asyncio.timeout(seconds):
                await read()
        return
    await read()
    assert expected.startswith("".join(text))
    if not kind.startswith("cut"):
        assert "".join(text) == expected


def gauges(metrics: str) -> dict[str, float]:
    found = re.findall(r"^(dlight_\w+)\{[^}]*\} (\S+)$", metrics, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_a_storm_of_streams(start_server: StartServer) -> None:
    with start_server() as server:

        async def main() -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(
                base_url=server.url, timeout=PATIENCE, trust_env=False, limits=limits
            ) as client:
                calm = {}
                for number in range(NUM_BODIES):  # with nobody else about
                    calm[number] = await whole(client, number)
                await asyncio.gather(
                    *(stream(client, n, calm[n % NUM_BODIES]) for n in range(NUM_STREAMS))
                )
                async with asyncio.timeout(PATIENCE):
                    while True:
                        state = gauges((await client.get("/metrics")).text)
                        names = ("running_sequences", "waiting_sequences", "kv_pages_used")
                        if not any(state[f"dlight_{name}"] for name in names):
                            break
                        await asyncio.sleep(0.05)
                assert state["dlight_waiting_tokens"] == 0
                assert await whole(client, 0) == calm[0]

        asyncio.run(main())


def test_sigterm_under_load(start_server: StartServer) -> None:
    """Every request that was taken ends properly; those that come later are refused."""
    with start_server() as server:

        async def main() -> list[str]:
            async with httpx.AsyncClient(
                base_url=server.url, timeout=PATIENCE, trust_env=False
            ) as client:
                calm = [await whole(client, n) for n in range(10)]
                asked = [asyncio.create_task(whole(client, n % 10)) for n in range(40)]
                await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                server.signal(signal.SIGTERM)
                late = []
                while True:
                    try:
                        late.append(await whole(client, 0))
                    except (httpx.TransportError, httpx.HTTPStatusError) as error:
                        late.append(type(error).__name__)
                        break
                answers = await asyncio.gather(*asked)
                assert answers == [calm[n % 10] for n in range(40)]
                return late

        assert asyncio.run(main())[-1] in ("HTTPStatusError", "ConnectError", "ReadError")
        assert server.wait() == 0
