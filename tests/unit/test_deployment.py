"""Libraries that come, go, switch and fail, in a real engines' process over fake runners."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from serve.config import Settings, load_settings
from serve.deployment import Deployment
from serve.engine import FinishEvent, SamplingParams, TokenEvent
from serve.engine.remote import HostProcess
from serve.errors import ConflictError, EngineError, LoadError, RequestError, ServeError
from serve.grammar import Grammars
from serve.libraries import Libraries, ModelFacts
from serve.metrics import Registry, render
from serve.tokenizer import Tokenizer
from tests.fakes import LIMITS

pytestmark = pytest.mark.unit

PATIENCE = 60.0
PROFILE = "[cpu]\nrules = []\n"
LONG = SamplingParams(max_tokens=200, temperature=0)
TOKENIZER = Tokenizer.bundled()
MODEL = ModelFacts("m", ("a/m",), 1024, TOKENIZER, Grammars(TOKENIZER))


def start_host(settings: Settings | None = None) -> HostProcess:  # noqa: ARG001
    return HostProcess([sys.executable, "-m", "tests.fake_host"])


class Live:
    """A deployment of a file's settings. said, deaths: what it told."""

    def __init__(self, folder: Path, text: str, on_death: str) -> None:
        self.folder, self._on_death = folder, on_death
        for name in ("broken", "slow"):
            (folder / f"{name}.toml").write_text(PROFILE)
        self.edit(text)
        self.said, self.deaths = list[str](), list[str]()
        settings, self.registry = self._settings(), Registry()
        self.libraries = Libraries(
            settings, MODEL, self.registry, self.said.append, self.deaths.append,
            start_host(), start_host,
        )  # fmt: skip
        self.deployment = Deployment(settings, "m", self.libraries, self._settings)
        self.load = partial(self.deployment.load, backend=None, wait=True)
        self.unload = partial(self.deployment.unload, backend=None, wait=True)
        self.make_default = partial(self.deployment.make_default, backend=None, wait=True)
        self.reload = self.deployment.reload

    def edit(self, text: str) -> None:
        (self.folder / "serve.toml").write_text(text)

    def release_slow(self) -> None:
        (self.folder / "go").touch()

    def _settings(self) -> Settings:
        flags = {"watchdog.on_death": self._on_death, "library.profiles_dir": str(self.folder)}
        return load_settings(self.folder / "serve.toml", {}, flags)

    @property
    def states(self) -> dict[str, str]:
        return {f"{s.backend}:{s.profile}": s.state for s in self.deployment.states()}

    @property
    def traffic(self) -> dict[str, float]:
        return {s.profile: s.traffic for s in self.deployment.states()}

    @property
    def default(self) -> str:
        assert self.libraries.served.default is not None
        return self.libraries.served.default.profile

    @property
    def names(self) -> set[str]:
        return set(self.libraries.served.names)

    @property
    def series(self) -> str:
        return render(self.registry)[0].decode()

    async def ask(self, name: str) -> int:
        """The number of tokens of an answer."""
        model = self.libraries.served.find(name)
        [stream] = model.submit([([1, 2, 3], SamplingParams(max_tokens=3, temperature=0))], "")
        return len([event async for event in stream if isinstance(event, TokenEvent)])

    def crash(self) -> None:
        [pid] = {x.engine._process.pid for x in self.libraries if x.engine is not None}
        os.kill(pid, signal.SIGKILL)


@contextlib.asynccontextmanager
async def live(folder: Path, text: str = "", on_death: str = "exit") -> AsyncIterator[Live]:
    async with asyncio.timeout(PATIENCE):
        found = Live(folder, text, on_death)
        try:
            await found.deployment.start()
            yield found
        finally:
            await asyncio.to_thread(found.libraries.close)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


Test = Callable[[Live], Awaitable[None]]


def run(folder: Path, test: Test, text: str = "", on_death: str = "exit") -> None:
    async def main() -> None:
        async with live(folder, text, on_death) as found:
            await test(found)

    asyncio.run(main())


ALSO = '[library]\nalso = ["matmul", "cpu:gemv"]\n'
SPLIT = "[traffic]\nweights = { full = 1.0, matmul = 3.0 }\n"


def test_what_the_settings_name_is_loaded(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        assert it.states == dict.fromkeys(["cpu:full", "cpu:matmul", "cpu:gemv"], "loaded")
        assert it.default == "full"
        assert it.names >= {"m", "a/m", "m@gemv", "m@cpu:gemv"}
        assert it.traffic == {"full": 1, "matmul": 0, "gemv": 0}
        assert await it.ask("m@gemv") == 3

    run(tmp_path, test, ALSO)


def test_a_start_that_fails(tmp_path: Path) -> None:
    async def main(text: str) -> None:
        async with live(tmp_path, text):
            pass

    for text, kind, why in [
        ('[library]\nalso = ["broken"]', LoadError, "it is broken"),
        ('[library]\nalso = ["none"]', RequestError, "no such profile"),
        ('[library]\nbackend = "abacus"', RequestError, "known: cpu, cuda"),
        ("[traffic]\nweights = { 'cuda:slow' = 1.0 }", RequestError, "no rules for it"),
    ]:
        with pytest.raises(kind, match=why):
            asyncio.run(main(text))


def test_load_switch_unload(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        state = await it.load("matmul")
        assert (state.state, state.digest, state.is_default) == (
            "loaded",
            "digest of matmul",
            False,
        )
        assert await it.load("matmul") == state  # again: nothing to do
        assert (await it.make_default("matmul")).is_default
        with pytest.raises(ConflictError, match="switch first"):
            await it.unload("matmul")
        assert (await it.unload("full")).state == "unloaded"
        assert it.states == {"cpu:matmul": "loaded"}
        assert not it.names & {"m@full", "m@cpu:full"}
        with pytest.raises(RequestError, match="cpu:full is not loaded; what is: cpu:matmul"):
            await it.unload("full")
        infos = re.findall(r'^dlight_library_info{.*profile="(\w+)"', it.series, re.MULTILINE)
        assert infos == ["matmul"]
        assert (await it.load("full")).state == "loaded"

    run(tmp_path, test)


def test_a_load_takes_its_time_while_the_others_serve(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        assert (await it.make_default("slow", wait=False)).phase == "queued"
        await until(lambda: "cpu:slow: compiling" in it.said)
        assert it.states["cpu:slow"] == "loading"
        [card] = [p for p in it.deployment.profiles() if p["name"] == "slow"]
        assert [(x["state"], x["phase"]) for x in card["libraries"]] == [("loading", "compiling")]
        with pytest.raises(ConflictError, match="being loaded"):
            await it.unload("slow")
        assert it.default == "full"
        assert await it.ask("m") == 3
        it.release_slow()
        await until(lambda: it.default == "slow")

    run(tmp_path, test)


def test_a_load_that_fails(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        for ask in (it.load, it.make_default):
            with pytest.raises(LoadError, match="it is broken"):
                await ask("broken")
        assert (await it.make_default("broken", wait=False)).state == "loading"
        await until(lambda: it.states["cpu:broken"] == "failed")
        assert it.default == "full"
        [failed] = [s for s in it.deployment.states() if s.state == "failed"]
        assert (failed.error, failed.phase) == ("it is broken", None)
        assert (await it.unload("broken")).state == "failed"
        assert it.states == {"cpu:full": "loaded"}

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("profile", "backend", "param"),
    [("none", None, "profile"), ("full", "abacus", "backend"), ("slow", "cuda", "profile")],
)
def test_what_does_not_exist(tmp_path: Path, profile: str, backend: str | None, param: str) -> None:
    async def test(it: Live) -> None:
        for ask in (it.deployment.load, it.deployment.make_default):
            with pytest.raises(RequestError) as caught:
                await ask(profile, backend, wait=False)
            assert caught.value.param == param
        assert it.states == {"cpu:full": "loaded"}

    run(tmp_path, test)


def test_what_is_computed_ends_before_its_library_goes(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.load("matmul")
        [stream] = it.libraries.served.find("m@matmul").submit([([1, 2, 3], LONG)], "")
        state = await it.unload("matmul", wait=False)
        assert (state.state, state.phase) == ("unloading", "finishing what runs")
        assert "m@matmul" not in it.names
        events = [event async for event in stream]
        assert isinstance(events[-1], FinishEvent)
        assert events[-1].reason == "length"
        await until(lambda: it.states == {"cpu:full": "loaded"})

    run(tmp_path, test)


def test_what_is_wanted_back_is_loaded_behind_its_unload(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.load("matmul")
        [stream] = it.libraries.served.find("m@matmul").submit([([1, 2, 3], LONG)], "")
        await it.unload("matmul", wait=False)
        it.edit(ALSO)
        reload = asyncio.create_task(it.reload())
        await asyncio.sleep(0)
        [state] = [s for s in it.deployment.states() if s.profile == "matmul"]
        assert (state.state, state.phase) == ("loading", "waiting until it is unloaded")
        *_, end = [event async for event in stream]
        assert isinstance(end, FinishEvent)
        assert end.reason == "length"
        await reload
        assert it.states == dict.fromkeys(["cpu:full", "cpu:matmul", "cpu:gemv"], "loaded")
        assert await it.ask("m@matmul") == 3

    run(tmp_path, test)


def test_the_end_waits_for_no_unload(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.load("matmul")
        [stream] = it.libraries.served.find("m@matmul").submit([([15, 2], LONG)], "")  # minutes
        await it.unload("matmul", wait=False)
        again = asyncio.create_task(it.load("matmul"))
        await it.libraries.drain(0)
        *_, end = [event async for event in stream]
        assert isinstance(end, FinishEvent)
        assert end.reason in ("cancelled", "error")
        with pytest.raises(ServeError):
            await again

    run(tmp_path, test)


def test_the_default_chosen_last_counts(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.make_default("slow", wait=False)
        await it.make_default("full")
        it.release_slow()
        await until(lambda: it.states["cpu:slow"] == "loaded" and not it.deployment._tasks)
        assert not (await it.load("slow")).is_default
        assert it.default == "full"

    run(tmp_path, test)


def test_weights_of_nothing_and_of_the_same_library(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        assert it.traffic == {"full": 0.75, "gemv": 0.25, "matmul": 0}
        it.edit("[traffic]\nweights = { matmul = 0.0 }")
        await it.reload()
        await until(lambda: it.traffic == {"full": 1, "matmul": 0})

    weights = '{ full = 1, "cpu:full" = 2, gemv = 1, matmul = 0 }'
    run(tmp_path, test, f"[traffic]\nweights = {weights}")


def test_a_reload_moves_to_the_new_settings(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        it.edit('[library]\nprofile = "gemv"\n' + SPLIT)
        report = await it.reload()
        assert report.changed == ["library.profile", "traffic.weights"]
        assert it.default == "gemv"
        assert it.traffic == {"full": 0.25, "gemv": 0, "matmul": 0.75}
        with pytest.raises(ConflictError, match="share of the traffic"):
            await it.unload("matmul")
        it.edit('[library]\nprofile = "gemv"\n')
        await it.reload()
        await until(lambda: it.states == {"cpu:gemv": "loaded"})
        assert (await it.reload()).changed == []

    run(tmp_path, test)


def test_what_had_failed_before_a_reload_that_fails_is_not_left_loaded(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.load("broken", wait=False)
        await until(lambda: it.states["cpu:broken"] == "failed")
        it.edit('[library]\nalso = ["gemv", "broken"]')
        with pytest.raises(LoadError):
            await it.reload()
        await until(lambda: it.states == {"cpu:full": "loaded"})

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("text", "kind", "why"),
    [
        ("[library", RequestError, "readable TOML"),
        ("[library]\nbackends = 1", RequestError, "backends"),
        ('[library]\nprofile = "none"', RequestError, "no such profile"),
        ('[library]\nprofile = "abacus:full"', RequestError, "abacus"),
        ('[library]\nalso = ["gemv", "broken"]', LoadError, "it is broken"),
        ("[server]\nport = 5", RequestError, "need a restart: server.port"),
    ],
)
def test_a_bad_edit_changes_nothing(
    tmp_path: Path, text: str, kind: type[ServeError], why: str
) -> None:
    async def test(it: Live) -> None:
        before = it.states, it.default, it.traffic, it.names
        it.edit(text)
        with pytest.raises(kind, match=why):
            await it.reload()
        await until(lambda: (it.states, it.default, it.traffic, it.names) == before)

    run(tmp_path, test, ALSO.replace(', "cpu:gemv"', "") + SPLIT)


def test_what_is_asked_for_during_a_reload_that_fails_stays(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        it.edit('[library]\nalso = ["matmul", "gemv", "slow", "broken"]')
        reload = asyncio.create_task(it.reload())
        await until(lambda: it.states.get("cpu:matmul") == "loaded")
        await it.make_default("matmul")
        it.release_slow()
        with pytest.raises(LoadError):
            await reload
        await until(lambda: it.states == {"cpu:full": "loaded", "cpu:matmul": "loaded"})
        assert it.default == "matmul"

    run(tmp_path, test)


def test_a_load_under_way_does_not_outlive_a_reload(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.load("slow", wait=False)
        await it.load("broken", wait=False)
        await until(lambda: it.states["cpu:broken"] == "failed")
        assert (await it.reload()).changed == []
        await until(lambda: it.states == {"cpu:full": "loaded", "cpu:slow": "loading"})
        it.release_slow()
        await until(lambda: it.states == {"cpu:full": "loaded"})
        assert not it.deployment._tasks

    run(tmp_path, test)


def test_reloads_wait_for_each_other(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        it.edit('[library]\nalso = ["slow"]')
        first = asyncio.create_task(it.reload())
        await until(lambda: it.states.get("cpu:slow") == "loading")
        it.edit('[library]\nalso = ["matmul"]')
        second = asyncio.create_task(it.reload())
        it.release_slow()
        assert (await first).changed == (await second).changed == ["library.also"]
        await until(lambda: it.states == {"cpu:full": "loaded", "cpu:matmul": "loaded"})

    run(tmp_path, test)


def test_what_is_unloaded_meanwhile_makes_a_reload_fail(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        it.edit('[library]\nprofile = "slow"\nalso = ["matmul"]')
        reload = asyncio.create_task(it.reload())
        await until(lambda: it.states.get("cpu:matmul") == "loaded")
        await it.unload("matmul")
        it.release_slow()
        with pytest.raises(ConflictError, match="cpu:matmul is not loaded any more"):
            await reload
        assert it.default == "full"

    run(tmp_path, test)


def test_after_a_crash_the_same_libraries_serve_again(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.make_default("matmul")
        it.crash()
        await until(lambda: not it.libraries.served.is_alive)
        with pytest.raises(EngineError):
            await it.ask("m")
        await until(lambda: "the engines are back" in it.said)
        assert it.states == {"cpu:full": "loaded", "cpu:matmul": "loaded"}
        assert it.default == "matmul"
        assert await it.ask("m@full") == await it.ask("m") == 3
        assert it.deaths == []

    run(tmp_path, test, on_death="restart")


def test_a_crash_during_load_and_unload(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        await it.load("matmul")
        await it.load("slow", wait=False)
        await until(lambda: "cpu:slow: compiling" in it.said)
        [stream] = it.libraries.served.find("m@matmul").submit([([13, 2], LONG)], "")  # stuck
        await it.unload("matmul", wait=False)
        it.crash()
        *_, end = [event async for event in stream]
        assert isinstance(end, FinishEvent)
        assert end.reason == "error"
        await until(lambda: "the engines are back" in it.said)
        assert it.states == {"cpu:full": "loaded", "cpu:slow": "failed"}
        assert await it.ask("m") == 3

    run(tmp_path, test, on_death="restart")


def test_engines_that_cannot_be_started_again_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(it: Live) -> None:
        def fail(_: Settings) -> HostProcess:
            raise OSError("no memory for a process")

        monkeypatch.setattr(it.libraries, "_start_host", fail)
        it.crash()
        await until(lambda: bool(it.deaths))
        assert "could not be started again: no memory" in it.deaths[0]

    run(tmp_path, test, on_death="restart")


def test_engines_that_die_as_soon_as_they_are_back(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        it.crash()
        await until(lambda: any("starting another" in said for said in it.said))
        await until(lambda: it.states["cpu:full"] == "loaded")
        it.crash()
        await until(lambda: bool(it.deaths) or it.said.count("the engines are back") == 2)
        assert it.deaths or await it.ask("m") == 3

    run(tmp_path, test, on_death="restart")


def test_a_stuck_process_does_not_outlive_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.remote._PATIENCE", 0.2)

    async def test(it: Live) -> None:
        it.crash()
        await until(lambda: "the engines are back" in it.said)
        [process] = {x.engine._process._process for x in it.libraries if x.engine is not None}
        process.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(it.libraries.close)
        assert process.wait(PATIENCE) == -signal.SIGKILL

    run(tmp_path, test, on_death="restart")


def test_a_load_that_ends_in_a_drain_is_not_served(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        [stream] = it.libraries.served.find("m").submit([([15, 2], LONG)], "")  # minutes
        await it.load("slow", wait=False)
        await until(lambda: "cpu:slow: compiling" in it.said)
        drain = asyncio.create_task(it.libraries.drain(1))
        await asyncio.sleep(0)
        it.release_slow()
        await drain
        assert it.states["cpu:slow"] == "failed"
        assert "m@slow" not in it.names
        *_, end = [event async for event in stream]
        assert isinstance(end, FinishEvent)
        assert end.reason == "cancelled"

    run(tmp_path, test)


def test_a_crash_ends_the_server_unless_told_otherwise(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        it.crash()
        await until(lambda: bool(it.deaths))
        assert "SIGKILL" in it.deaths[0]

    run(tmp_path, test)


def test_a_profile_that_cannot_be_read_is_told_so(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        (it.folder / "slow.toml").write_text("[cpu")
        found = {profile["name"]: profile for profile in it.deployment.profiles()}
        assert "not readable as TOML" in found["slow"]["error"]
        assert "error" not in found["full"]

    run(tmp_path, test)


def test_a_kv_cache_that_holds_no_whole_context_is_told(tmp_path: Path) -> None:
    async def test(it: Live) -> None:
        [warning] = [said for said in it.said if "WARNING" in said]
        assert f"holds {LIMITS.max_context} tokens, of the 1024" in warning

    run(tmp_path, test)
