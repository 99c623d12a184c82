"""The server over HTTP, from the command line to the last token."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import threading
from importlib.resources import files
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import PATIENCE, ServerProcess, StartServer

pytestmark = pytest.mark.e2e

ADDRESS = (files("serve") / "data" / "gettysburg.txt").read_text(encoding="utf-8")
BEGINNING = "Four score and seven years ago"
REQUEST = {"model": "gettysburg", "prompt": BEGINNING, "max_tokens": 320, "temperature": 0}


def test_it_recites_the_address(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json=REQUEST).json()
    [choice] = answer["choices"]
    assert BEGINNING + choice["text"] == ADDRESS
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 6


def test_the_printed_command_works_when_pasted(server: ServerProcess) -> None:
    [line] = [line for line in server.output if "curl" in line]
    done = subprocess.run(
        ["bash", "-c", line.replace("curl", "curl --noproxy '*' --silent --fail")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert BEGINNING + json.loads(done.stdout)["choices"][0]["text"] == ADDRESS


def test_the_openai_client_streams(server: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        stream = client.completions.create(stream=True, **REQUEST)  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert BEGINNING + text == ADDRESS


def requests() -> list[dict[str, Any]]:
    """16 with different lengths, seeds and stop strings, hot enough that the seeds matter."""
    words = ADDRESS.split()
    return [
        {
            "model": "gettysburg",
            "prompt": " ".join(words[7 * i : 7 * i + 3 + i]),
            "max_tokens": 20 + 11 * i,
            "temperature": (0, 1, 2, 1.5)[i % 4],
            "top_p": (1, 0.9)[i % 2],
            "seed": 100 + i,
            "stop": [" nation", " people", "e d"][: i % 4] or None,
            "stream": True,
        }
        for i in range(16)
    ]


async def stream_text(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str]:
    """The streamed text and the finish reason."""
    text, reason = "", ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
    return text, reason


def test_sixteen_streams_give_what_each_gives_alone(server: ServerProcess) -> None:
    async def both() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        async with httpx.AsyncClient(
            base_url=server.url, timeout=PATIENCE, trust_env=False
        ) as client:
            alone = [await stream_text(client, body) for body in requests()]
            together = await asyncio.gather(*(stream_text(client, body) for body in requests()))
        return alone, list(together)

    alone, together = asyncio.run(both())
    assert together == alone
    assert len({text for text, _ in alone}) == 16
    assert {reason for _, reason in alone} == {"stop", "length"}


def test_counters_equal_what_was_sent(start_server: StartServer) -> None:
    with (
        start_server("--set", "engine.prefix_sharing=false") as process,
        httpx.Client(base_url=process.url, timeout=PATIENCE, trust_env=False) as client,
    ):
        body = {"model": "gettysburg", "prompt": [50256] * 322, "max_tokens": 9}
        for _ in range(3):
            client.post("/v1/completions", json=body | {"ignore_eos": True}).raise_for_status()
        metrics = client.get("/metrics").text
    assert _metric(metrics, "dlight_prefill_tokens_total") == 3 * 322
    assert _metric(metrics, "dlight_decode_tokens_total") == 3 * 8  # prefill gives the first token
    assert _metric(metrics, "dlight_kv_pages_used") == 0
    assert _metric(metrics, "dlight_running_sequences") == 0
    assert _metric(metrics, "dlight_prefill_tokens_per_second") > 0


def _metric(metrics: str, name: str) -> float:
    [value] = re.findall(rf"^{name}{{.*}} (\S+)$", metrics, re.MULTILINE)
    return float(value)


def test_models_health_and_errors(client: httpx.Client) -> None:
    ids = {model["id"] for model in client.get("/v1/models").json()["data"]}
    assert {"gettysburg", "gettysburg@full", "gettysburg@cpu:full"} <= ids
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    unknown = client.post("/v1/completions", json=REQUEST | {"model": "gpt5"})
    assert unknown.status_code == 404
    assert "gettysburg@full" in unknown.json()["error"]["message"]
    too_long = client.post("/v1/completions", json=REQUEST | {"max_tokens": 1019})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    for number in ("1025", "1024"):
        assert number in too_long.json()["error"]["message"]


def test_sigterm_lets_running_requests_end(start_server: StartServer) -> None:
    process = start_server()
    texts: list[str] = []

    def generate() -> None:
        with (
            httpx.Client(base_url=process.url, timeout=PATIENCE, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=REQUEST | {"stream": True}) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
                    begun.set()

    begun = threading.Event()
    thread = threading.Thread(target=generate)
    thread.start()
    assert begun.wait(PATIENCE)
    process.signal(signal.SIGTERM)
    thread.join(PATIENCE)
    assert process.wait() == 0
    assert BEGINNING + "".join(texts) == ADDRESS
    assert process.output[-1] == "stopped\n"


def test_a_second_signal_ends_at_once(start_server: StartServer) -> None:
    """Profile baseline, whose 900 tokens would take minutes of the drain."""
    slow = ("--model", "synthetic:distilgpt2", "--profile", "baseline")
    process = start_server(*slow, "--set", "server.drain_seconds=600")
    body = {"model": "synthetic-distilgpt2", "prompt": "a", "max_tokens": 900, "ignore_eos": True}
    events: list[str] = []
    begun = threading.Event()

    def generate() -> None:
        with (
            httpx.Client(base_url=process.url, timeout=PATIENCE, trust_env=False) as client,
            client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer,
        ):
            for line in answer.iter_lines():
                events.append(line)
                begun.set()

    thread = threading.Thread(target=generate)
    thread.start()
    assert begun.wait(PATIENCE)
    host, port = process.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half = socket.create_connection((host, int(port)), PATIENCE)
    half.sendall(head + b"Content-Length: 99\r\n\r\n{")
    process.signal(signal.SIGTERM)
    process.wait_for("Shutting down")  # two signals at a time would be one
    process.signal(signal.SIGTERM)
    thread.join(PATIENCE)
    assert process.wait() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert "data: [DONE]" not in events
    with half:
        assert half.recv(65536).startswith(b"HTTP/1.1 503")
    assert not any("Traceback" in line for line in process.output)


def test_a_json_log_has_nothing_but_objects(start_server: StartServer) -> None:
    with start_server("--set", "server.log_format=json") as process:
        host, port = process.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 400")
        process.wait_for("Invalid HTTP request")
    logged = [line for line in process.output if "INFO" in line or "WARNING" in line]
    assert {json.loads(line)["logger"] for line in logged} >= {"uvicorn.error"}
