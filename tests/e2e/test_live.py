"""Libraries loaded, switched and unloaded under a running server; engines that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import PATIENCE, ServerProcess, StartServer

pytestmark = pytest.mark.e2e

PROMPT = "Four score and seven years ago"
SPEECH = " our fathers brought forth on this continent, a new nation"


def complete(client: httpx.Client, model: str = "gettysburg", **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 11, "temperature": 0} | fields
    return client.post("/v1/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    answer: str = response.json()["choices"][0]["text"]
    return answer


def admin(client: httpx.Client, action: str, profile: str, **fields: Any) -> httpx.Response:
    return client.post(f"/admin/models/{action}", json={"profile": profile, "wait": True} | fields)


def states(client: httpx.Client) -> dict[str, str]:
    return {
        x["name"].partition("@")[2].removeprefix("cpu:"): x["state"]
        for x in client.get("/admin/models").json()
    }


def engines_of(server: ServerProcess) -> int:
    """The pid of its engines' process."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    [pid] = [int(p) for p in children if b"serve.host" in Path(f"/proc/{p}/cmdline").read_bytes()]
    return pid


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    return tmp_path / "edited.toml"


@pytest.fixture(scope="module")
def live(start_server: StartServer) -> Iterator[tuple[ServerProcess, httpx.Client]]:
    with (
        start_server() as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
    ):
        yield server, client


def test_load_use_switch_unload(live: tuple[ServerProcess, httpx.Client]) -> None:
    _, client = live
    assert complete(client, "gettysburg@matmul").status_code == 404
    loaded = admin(client, "load", "matmul")
    assert loaded.status_code == 200, loaded.text
    assert loaded.json()["state"] == "loaded"
    for model in ("gettysburg", "gettysburg@matmul", "gettysburg@cpu:matmul", "gettysburg@full"):
        assert text(complete(client, model)) == SPEECH
    names = [card["id"] for card in client.get("/v1/models").json()["data"]]
    assert len(names) == len(set(names))
    assert {"gettysburg", "gettysburg@matmul", "gettysburg@full"} <= set(names)
    digests = {
        model: complete(client, model).json()["system_fingerprint"]
        for model in ("gettysburg@matmul", "gettysburg@full")
    }
    assert len(set(digests.values())) == 2
    assert admin(client, "default", "matmul").json()["is_default"]
    assert complete(client).json()["system_fingerprint"] == digests["gettysburg@matmul"]
    refused = admin(client, "unload", "matmul")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert admin(client, "default", "full").json()["is_default"]
    assert admin(client, "unload", "matmul").status_code == 200
    assert complete(client, "gettysburg@matmul").status_code == 404
    assert states(client) == {"full": "loaded"}
    assert text(complete(client)) == SPEECH


def test_the_engines_have_no_torch(live: tuple[ServerProcess, httpx.Client]) -> None:
    server, _ = live
    maps = Path(f"/proc/{engines_of(server)}/maps").read_text()
    assert "libtvm" in maps
    assert "libtorch" not in maps


def test_what_cannot_be_loaded(live: tuple[ServerProcess, httpx.Client]) -> None:
    _, client = live
    unknown = admin(client, "load", "none-such")
    assert unknown.status_code == 400
    assert "none-such" in unknown.json()["error"]["message"]
    assert "known: " in unknown.json()["error"]["message"]
    backend = admin(client, "load", "full", backend="abacus")
    assert (backend.status_code, backend.json()["error"]["param"]) == (400, "backend")
    assert "abacus" in backend.json()["error"]["message"]
    assert states(client) == {"full": "loaded"}
    assert admin(client, "unload", "gemv").status_code == 400
    assert text(complete(client)) == SPEECH


def test_profiles_tell_rules_and_coverage(live: tuple[ServerProcess, httpx.Client]) -> None:
    _, client = live
    profiles = {p["name"]: p for p in client.get("/v1/profiles").json()["data"]}
    assert {"baseline", "matmul", "gemv", "reduction", "full", "stock"} <= set(profiles)
    assert [r["id"] for r in profiles["full"]["rules"]["cpu"]][:2] == ["cpu.matmul", "cpu.gemv"]
    full = client.get("/v1/profiles/full").json()
    [library] = full["libraries"]
    assert (library["state"], library["is_default"]) == ("loaded", True)
    assert {k["rule"] for k in library["coverage"]} >= {"cpu.matmul", "cpu.attention"}
    missing = client.get("/v1/profiles/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "profile_not_found")


def test_switches_and_loads_under_load(live: tuple[ServerProcess, httpx.Client]) -> None:
    """30 switches and 10 cycles; no failed or wrong answer, and the memory comes back."""
    server, client = live
    pid = engines_of(server)
    admin(client, "load", "gemv")
    stop, answers = threading.Event(), []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as own:
            while not stop.is_set():
                answers.append(text(complete(own)))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for n in range(30):
                assert admin(client, "default", ("gemv", "full")[n % 2]).json()["is_default"]
            admin(client, "unload", "gemv")
            sizes = []
            for _ in range(10):
                assert admin(client, "load", "gemv").json()["state"] == "loaded"
                assert admin(client, "default", "gemv").status_code == 200
                assert admin(client, "default", "full").status_code == 200
                assert admin(client, "unload", "gemv").status_code == 200
                sizes.append(resident_bytes(pid))
        finally:
            stop.set()
        for future in asking:
            future.result()
    assert len(answers) > 8
    assert set(answers) == {SPEECH}
    assert max(sizes[5:]) < 1.1 * max(sizes[:3]), sizes


def test_traffic_is_split_and_sticky(start_server: StartServer, settings: Path) -> None:
    settings.write_text("[traffic]\nweights = { full = 1.0, matmul = 1.0 }\n")
    with (
        start_server("--config", str(settings)) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
    ):
        assert states(client) == {"full": "loaded", "matmul": "loaded"}
        seen = [complete(client).json()["system_fingerprint"] for _ in range(40)]
        assert len(set(seen)) == 2
        for who in ("a", "b", "c"):
            header = {"x-session-id": who}
            body = {"model": "gettysburg", "prompt": PROMPT, "max_tokens": 1}
            stuck = {
                client.post("/v1/completions", json=body, headers=header).json()[
                    "system_fingerprint"
                ]
                for _ in range(6)
            }
            assert len(stuck) == 1
        refused = admin(client, "unload", "matmul")
        assert refused.status_code == 409

        # An edit, and SIGHUP: the split ends, and what it needed goes.
        settings.write_text('[library]\nprofile = "matmul"\n')
        server.signal(signal.SIGHUP)
        server.wait_for("reloaded; changed: library.profile, traffic.weights; loaded: ")
        until(lambda: states(client) == {"matmul": "loaded"})
        assert complete(client).json()["model"] == "gettysburg"

        for bad, why in (
            ("[library]\nprofile = 3\n", "library.profile"),
            ('[library]\nprofile = "none-such"\n', "none-such"),
            ("[engine]\nmax_running = 5\n", "engine.max_running"),
            ('[library]\nprofile = "matmul"\nalso = ["nope:full"]\n', "nope"),
            ("[library\n", "TOML"),
        ):
            settings.write_text(bad)
            answer = client.post("/admin/reload", json={})
            assert answer.status_code in (400, 409), answer.text
            assert why in answer.json()["error"]["message"]
            server.signal(signal.SIGHUP)
            server.wait_for(f"reload refused.*{why}")
            assert states(client) == {"matmul": "loaded"}
            assert text(complete(client)) == SPEECH


def stream(server: ServerProcess, started: threading.Semaphore) -> tuple[str, float]:
    """The stream's last event, and when it came."""
    body = {"model": "gettysburg", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True}
    events: list[str] = []
    with (
        httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response,
    ):
        for line in response.iter_lines():
            if response.status_code != 200 or line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                started.release()
    return events[-1], time.monotonic()


def kill_under_load(server: ServerProcess) -> None:
    """Every client is told within 2 seconds."""
    started = threading.Semaphore(0)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, server, started) for _ in range(8)]
        for _ in range(40):
            assert started.acquire(timeout=PATIENCE)
        now = time.monotonic()
        signal_engines(server)
        for last, when in (future.result() for future in streams):
            assert "error" in json.loads(last), last
            assert when - now < 2.0


def signal_engines(server: ServerProcess, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(engines_of(server), number)


def test_the_server_ends_with_an_error_when_its_engines_die(start_server: StartServer) -> None:
    with start_server() as server:
        kill_under_load(server)
        assert server.wait() == 1
    assert "signal 9 (SIGKILL)" in "".join(server.output)


def test_a_crash_in_native_code_is_told_and_restarted(start_server: StartServer) -> None:
    with (
        start_server("--set", "watchdog.on_death=restart") as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
    ):
        for number in (signal.SIGSEGV, signal.SIGKILL):
            signal_engines(server, number)
            until(lambda: client.get("/health").status_code == 503)
            refused = complete(client)
            assert refused.status_code in (200, 503)
            until(lambda: client.get("/ready").status_code == 200)
            assert text(complete(client)) == SPEECH
        assert client.get("/health").status_code == 200


def test_too_large_a_cache_is_an_error_that_says_what_to_lower(
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    ended = command("run", "--port", "0", "--set", "runner.kv_tokens=1000000000000")
    assert ended.returncode == 1
    assert "out of memory" in ended.stderr
    assert "lower runner.kv_tokens" in ended.stderr


def test_a_stuck_engine_is_noticed(start_server: StartServer) -> None:
    with (
        start_server(
            "--set", "watchdog.on_death=restart", "--set", "watchdog.max_step_seconds=2"
        ) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client,
    ):
        signal_engines(server, signal.SIGSTOP)  # as good as stuck: it answers no more
        answer = complete(client)
        assert answer.status_code == 503, answer.text
        assert "stuck" in "".join(server.output)
        until(lambda: client.get("/ready").status_code == 200)
        assert text(complete(client)) == SPEECH
