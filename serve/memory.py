"""How much memory this process may still take, where the system tells (Linux)."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """The least of what the machine has left and what its control group may take; None: unknown."""
    known = [bytes_ for bytes_ in (_of_machine(meminfo), _of_group(cgroup)) if bytes_ is not None]
    return min(known, default=None)


def _of_machine(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text("ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
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
