"""The cache of compiled libraries.

One folder for each key, stored by one rename, compiled once at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.compiler.library import Library, open_library
from serve.errors import LibraryError

log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """DLIGHT_CACHE_DIR, else $XDG_CACHE_HOME/dlight-serve, else ~/.cache/dlight-serve."""
    given = os.environ.get("DLIGHT_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dlight-serve"


class LibraryCache:
    """Libraries under `root`/libraries/<key>."""

    def __init__(self, root: Path) -> None:
        self._root = root / "libraries"

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
        """One process at a time; the lock goes with its process, however that ends."""
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / f"{key}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def store(self, key: str, build: Callable[[Path], None]) -> Library:
        """Let `build` fill a temporary folder, then put it in place.

        Call it under the key's lock.
        """
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=self._root))
        try:
            build(temporary)
            library = open_library(temporary)  # never store what could not be loaded
            folder = self.folder(key)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return Library(folder / library.path.name, library.manifest)
