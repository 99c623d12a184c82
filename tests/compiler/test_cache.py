"""The cache: whole libraries or none, each compiled once, whoever asks and whoever dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.compiler import compile as compile_
from serve.compiler.cache import LibraryCache, default_cache_dir
from serve.compiler.compile import Compiled, get_library
from serve.compiler.library import LIBRARY_FILE, MANIFEST_FILE, Library, open_library
from serve.errors import LibraryError
from tests.compiler.conftest import Plugin, is_running, toy_job, wait_until

pytestmark = pytest.mark.compiler

KEY = toy_job().request()["key"]


@pytest.fixture(scope="session")
def good(compiled: tuple[Compiled, list[str]]) -> Path:
    """A whole entry."""
    return compiled[0].library.path.parent


@pytest.fixture
def mine(tmp_path: Path, good: Path) -> LibraryCache:
    """A cache of the test's own, with that entry in it."""
    mine = LibraryCache(tmp_path / "cache")
    shutil.copytree(good, mine.folder(KEY))
    return mine


@pytest.fixture
def builds(good: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are compiled, by copying the good entry instead."""
    keys: list[str] = []

    def copy(request: dict[str, Any], *_: Any) -> None:
        keys.append(request["key"])
        copy_files(good)(Path(request["folder"]))

    monkeypatch.setattr(compile_, "compile_in_child", copy)
    return keys


def copy_files(source: Path) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        for file in source.iterdir():
            shutil.copy(file, folder)

    return copy


def names(cache: LibraryCache) -> list[str]:
    """What is in the cache, without the locks."""
    root = cache.folder(KEY).parent
    return [path.name for path in root.iterdir() if path.suffix != ".lock"]


def flip(name: str, position: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, kept: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * kept)])

    return damage


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def folder_for_a_file(folder: Path) -> None:
    (folder / LIBRARY_FILE).unlink()
    (folder / LIBRARY_FILE).mkdir()


def another_key(folder: Path) -> None:
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace(KEY, "0" * 64))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte of the code": flip(LIBRARY_FILE, 0),
    "a byte of the code": flip(LIBRARY_FILE, 20_000),
    "last byte of the code": flip(LIBRARY_FILE, -1),
    "half of the code": cut(LIBRARY_FILE, 0.5),
    "no byte of the code": cut(LIBRARY_FILE, 0),
    "no code": without(LIBRARY_FILE),
    "a byte of the manifest": flip(MANIFEST_FILE, 500),
    "half of the manifest": cut(MANIFEST_FILE, 0.5),
    "no byte of the manifest": cut(MANIFEST_FILE, 0),
    "no manifest": without(MANIFEST_FILE),
    "another's manifest": another_key,
    "an empty folder": without(LIBRARY_FILE, MANIFEST_FILE),
    "a folder for a file": folder_for_a_file,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again_and_never_loaded(
    mine: LibraryCache,
    builds: list[str],
    good: Path,
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    DAMAGES[damage](mine.folder(KEY))
    assert mine.find(KEY) is None
    assert "ignoring a damaged cache entry, it will be built again" in caplog.text
    result = get_library(toy_job(), mine)
    assert (result.source, builds, names(mine)) == ("compiled", [KEY], [KEY])
    assert result.library.manifest == open_library(good).manifest
    assert result.library.path == mine.folder(KEY) / LIBRARY_FILE
    assert get_library(toy_job(), mine).source == "cache"
    assert builds == [KEY]


def test_the_entry_of_another_key(mine: LibraryCache, caplog: pytest.LogCaptureFixture) -> None:
    """Whole, but not what was asked for: such as a folder that somebody renamed."""
    other = "0" * 64
    mine.folder(KEY).rename(mine.folder(other))
    assert mine.find(other) is None
    assert f"the manifest's key is {KEY}" in caplog.text
    assert mine.find(KEY) is None


def test_what_a_killed_process_leaves_is_no_entry_and_is_cleared_away(
    mine: LibraryCache, builds: list[str], good: Path
) -> None:
    root = mine.folder(KEY).parent
    shutil.rmtree(mine.folder(KEY))
    for process_id in (1, os.getpid()):
        copy_files(good)(make(root / f".building-{KEY}-{process_id}"))
    other = make(root / f".building-{'0' * 64}-1")  # of one that may still be at work
    (root / f"{KEY}.lock").touch()
    assert mine.find(KEY) is None
    assert get_library(toy_job(), mine).source == "compiled"
    assert builds == [KEY]
    assert sorted(names(mine)) == sorted([KEY, other.name])


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_build_that_fails_leaves_what_was_there(
    mine: LibraryCache, good: Path, error: type[BaseException]
) -> None:
    def fail(folder: Path) -> None:
        copy_files(good)(folder)
        raise error

    with pytest.raises(error):
        mine.store(KEY, fail)
    assert names(mine) == [KEY]
    assert mine.find(KEY) is not None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_build_that_leaves_no_library_is_not_stored(
    mine: LibraryCache, good: Path, damage: str
) -> None:
    shutil.rmtree(mine.folder(KEY))

    def build(folder: Path) -> None:
        copy_files(good)(folder)
        DAMAGES[damage](folder)

    with pytest.raises(LibraryError):
        mine.store(KEY, build)
    assert names(mine) == []


def test_it_is_there_all_at_once(mine: LibraryCache, good: Path) -> None:
    """Whoever looks in the meantime finds nothing, or a whole library."""
    shutil.rmtree(mine.folder(KEY))
    seen: list[Library | None] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(mine.find(KEY))

    def build(folder: Path) -> None:
        copy_files(good)(folder)
        wait_until(lambda: len(seen) > 20)
        assert mine.find(KEY) is None

    thread = threading.Thread(target=look)
    thread.start()
    try:
        stored = mine.store(KEY, build)
        wait_until(lambda: seen[-1] is not None)
    finally:
        done.set()
        thread.join()
    first = next(index for index, library in enumerate(seen) if library is not None)
    assert all(library == stored for library in seen[first:])


def test_others_may_read_it(mine: LibraryCache, good: Path) -> None:
    """As far as the umask lets them: an image's cache is filled by one user and read by another."""
    shutil.rmtree(mine.folder(KEY))
    before = os.umask(0o022)
    try:
        mine.store(KEY, copy_files(good))
    finally:
        os.umask(before)
    assert mine.folder(KEY).stat().st_mode & 0o777 == 0o755


def test_a_read_only_cache_will_do_for_what_is_in_it(
    mine: LibraryCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def refuse(*_: Any) -> Iterator[None]:
        raise LibraryError("read-only")
        yield

    monkeypatch.setattr(LibraryCache, "lock", refuse)
    assert get_library(toy_job(), mine).source == "cache"


def occupied(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("place", ["cache", "cache/libraries", f"cache/libraries/{KEY}"])
def test_a_cache_that_cannot_be_written(tmp_path: Path, builds: list[str], place: str) -> None:
    """There is a file where a folder should be. (As root, all else can be written.)"""
    occupied(tmp_path / place)
    cache = LibraryCache(tmp_path / "cache")
    with pytest.raises(LibraryError, match="the cache of libraries cannot be written: ") as caught:
        get_library(toy_job(), cache)
    assert str(tmp_path / "cache" / "libraries") in str(caught.value)
    assert not list((tmp_path).rglob(".building-*"))
    assert len(builds) == (place == f"cache/libraries/{KEY}")


@pytest.mark.parametrize("method", ["open", "mkdir"])
def test_no_room_in_the_cache(
    mine: LibraryCache, builds: list[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    shutil.rmtree(mine.folder(KEY))
    real = getattr(Path, method)

    def full(path: Path, *args: Any, **options: Any) -> Any:
        if path.is_relative_to(mine.folder(KEY).parent):
            raise OSError(28, "No space left on device")
        return real(path, *args, **options)

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(LibraryError, match=r"cannot be written: .*No space left on device"):
        get_library(toy_job(), mine)
    assert builds == []


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLIGHT_CACHE_DIR", "/given")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_dir() == Path("/given")
    monkeypatch.setenv("DLIGHT_CACHE_DIR", "")
    assert default_cache_dir() == Path("/xdg/dlight-serve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path("/home/me/.cache/dlight-serve")
    assert LibraryCache(Path("~/mine")).folder("key") == Path("/home/me/mine/libraries/key")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's user is, if nobody gave it one."""
    for name in ("DLIGHT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(LibraryError, match=r"no home folder .*: set DLIGHT_CACHE_DIR"):
        default_cache_dir()


def test_threads_of_one_process_compile_once(mine: LibraryCache, builds: list[str]) -> None:
    shutil.rmtree(mine.folder(KEY))
    sources: list[str] = []
    barrier = threading.Barrier(4)

    def ask() -> None:
        barrier.wait()
        sources.append(get_library(toy_job(), mine).source)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sources) == ["cache", "cache", "cache", "compiled"]
    assert builds == [KEY]


ASK = """
import sys
from pathlib import Path
from profiles import read_profile
from serve.compiler.cache import LibraryCache
from serve.compiler.compile import get_library
from tests.compiler.conftest import toy_job

profile, cache = map(Path, sys.argv[1:])
say = lambda phase: print(phase, flush=True)
say(get_library(toy_job(read_profile(profile)), LibraryCache(cache), say).source)
"""


class Asking:
    """A real process that asks for the toy's library under a profile."""

    def __init__(self, profile: str, cache: Path) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", ASK, profile, str(cache)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        self.said: list[str] = []

    def says(self, *endings: str) -> None:
        """Read on until it says one of these."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())
            if line.strip().endswith(endings):
                return
        raise AssertionError(f"it ended after {self.said}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The gated rule waits until this file exists."""
    return tmp_path / "gate"


@pytest.fixture
def ask(plugin: Plugin, gate: Path, tmp_path: Path) -> Iterator[Callable[[], Asking]]:
    """Processes that all ask for one library, whose compiler waits at the gate."""
    write_id = f"open({str(tmp_path / 'compilers')!r}, 'a').write(f'{{os.getpid()}}\\n')"
    wait = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists({str(gate)!r}), True)]"
    profile = plugin(wait, on_import=write_id)
    asking: list[Asking] = []

    def start() -> Asking:
        asking.append(Asking(profile.source, tmp_path / "cache"))
        return asking[-1]

    yield start
    gate.touch()
    for each in asking:
        each.end()


WAITING = "waiting for another process that compiles the same library"


def compilers(tmp_path: Path) -> list[int]:
    """The ids of those there have been."""
    return [int(line) for line in (tmp_path / "compilers").read_text().splitlines()]


def test_two_processes_at_once_compile_once(
    ask: Callable[[], Asking], gate: Path, tmp_path: Path
) -> None:
    first = ask()
    first.says("schedule")
    second = ask()
    second.says(WAITING)
    gate.touch()
    first.says("compiled")
    second.says("cache")
    assert second.said == [WAITING, "cache"]
    assert len(compilers(tmp_path)) == 1
    assert first.process.wait() == second.process.wait() == 0


def test_the_second_goes_on_when_the_first_is_killed(
    ask: Callable[[], Asking], gate: Path, tmp_path: Path
) -> None:
    first = ask()
    first.says("schedule")
    second = ask()
    second.says(WAITING)
    (left,) = compilers(tmp_path)
    first.process.kill()
    second.says("schedule")
    gate.touch()
    second.says("compiled")
    assert second.said[0] == WAITING
    wait_until(lambda: not is_running(left))  # nobody reads what it says
    (folder,) = (path for path in (tmp_path / "cache/libraries").iterdir() if path.is_dir())
    assert open_library(folder).manifest.profile == "own"
