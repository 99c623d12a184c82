"""The cache of compiled libraries.

One folder for each key, stored by one rename, compiled once at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.compiler.library import Library, open_library
from serve.errors import LibraryError

log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """DLIGHT_CACHE_DIR, else $XDG_CACHE_HOME/dlight-serve, else ~/.cache/dlight-serve.

    Raises LibraryError where this user has no home.
    """
    given = os.environ.get("DLIGHT_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise LibraryError("no home folder to keep compiled libraries in: set DLIGHT_CACHE_DIR")
    return Path(base) / "dlight-serve"


class LibraryCache:
    """Libraries under `root`/libraries/<key>."""

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.expanduser(root)) / "libraries"

    def folder(self, key: str) -> Path:
        return self._root / key

    def find(self, key: str) -> Library | None:
        """The library, if it is there, whole, and the one that was asked for."""
        folder = self.folder(key)
        if not folder.is_dir():
            return None
        try:
            library = open_library(folder)
            if library.manifest.key != key:
                raise LibraryError(f"{folder}: the manifest's key is {library.manifest.key}")
        except LibraryError as error:
            log.warning("ignoring a damaged cache entry, it will be built again: %s", error)
            return None
        return library

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """One process at a time; the lock goes with its process, however that ends.

        Raises LibraryError if the cache cannot be written.
        """
        with self._writing():
            self._root.mkdir(parents=True, exist_ok=True)
            file = (self._root / f"{key}.lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def store(self, key: str, build: Callable[[Path], None]) -> Library:
        """Let `build` fill a temporary folder, then put it in place.

        Call it under the key's lock. Raises LibraryError if the cache cannot be written, or `build`
        leaves no library.
        """
        for left in self._root.glob(f".building-{key}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = self._root / f".building-{key}-{os.getpid()}"
        with self._writing():
            temporary.mkdir()
        try:
            build(temporary)
            library = open_library(temporary)  # never store what could not be loaded
            folder = self.folder(key)
            with self._writing():
                if folder.exists():
                    shutil.rmtree(folder)
                temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Library(folder / library.path.name, library.manifest)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"{self._root}: the cache of libraries cannot be written: {error}"
            raise LibraryError(message) from error
