"""How much memory this process may still promise, where the system tells (Linux)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")

Parts = Mapping[Hashable, int]  # bytes; a part that several claims have is the same memory


class Variant(NamedTuple):
    """A part that may come in several forms, each of its own memory.

    None is one of them, but nobody knows yet which: no more memory, beside any of them.
    """

    of: Hashable
    form: Hashable | None


class Claims:
    """What this process has promised to what lives in it.

    The system hands out memory when it is first written, which for a KV cache is when requests
    come: what it calls available is in part promised. What the process has taken since its first
    living claim counts as such promises kept.
    """

    def __init__(
        self, available: Callable[[], int | None], resident: Callable[[], int | None]
    ) -> None:
        self._available, self._resident = available, resident
        self._lock = threading.Lock()
        self._claims: dict[Hashable, Parts] = {}  # by owner
        self._before = 0  # resident when there was no claim

    def parts(self) -> dict[Hashable, int]:
        """All that is claimed."""
        return _together(list(self._claims.values()))

    def new(self, parts: Parts) -> int:
        """Bytes of those parts that nobody has claimed already."""
        claimed = self.parts()
        return sum(_together([claimed, parts]).values()) - sum(claimed.values())

    def room(self) -> tuple[int, int] | None:
        """Bytes that are available, and how many more are promised; None: unknown."""
        available, resident = self._available(), self._resident()
        if available is None or resident is None:
            return None
        outstanding = sum(self.parts().values()) - max(0, resident - self._before)
        return available, max(0, outstanding)

    def claim(self, owner: Hashable, parts: Parts) -> bool:
        """Whether there is room for those parts that nobody else has claimed already.

        In place of what the owner has claimed before; if not, it has no claim any more.
        """
        with self._lock:
            self.end(owner)
            room = self.room()
            if room is not None and self.new(parts) > max(0, room[0] - room[1]):
                return False
            if not self._claims:
                self._before = self._resident() or 0
            self._claims[owner] = parts
            return True

    def end(self, owner: Hashable) -> None:
        """Without the lock: the garbage collector may call it in the thread that has the lock."""
        self._claims.pop(owner, None)


def _together(claims: Iterable[Parts]) -> dict[Hashable, int]:
    parts = {part: size for claim in claims for part, size in claim.items()}
    variants = [part for part in parts if isinstance(part, Variant)]
    known = {part.of for part in variants if part.form is not None}
    for part in variants:
        if part.form is None and part.of in known:
            del parts[part]
    return parts


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """The least of what the machine has left and what its control group may take; None: unknown."""
    known = [bytes_ for bytes_ in (_of_machine(meminfo), _of_group(cgroup)) if bytes_ is not None]
    return min(known, default=None)


def resident_bytes(status: Path = _STATUS) -> int | None:
    """What this process has written of its own memory; None: unknown."""
    return _field(status, "RssAnon")


def _of_machine(meminfo: Path) -> int | None:
    return _field(meminfo, "MemAvailable")


def _field(file: Path, wanted: str) -> int | None:
    try:
        lines = file.read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == wanted:
            return int(value.split()[0]) * 1024
    return None


def _of_group(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text("ascii").strip()
        used = int((folder / "memory.current").read_text("ascii"))
        stat = (folder / "memory.stat").read_text("ascii").split()
    except OSError:
        return None
    if limit == "max":
        return None
    cached = int(stat[stat.index("inactive_file") + 1])  # given up as soon as it is needed
    return int(limit) - used + cached
