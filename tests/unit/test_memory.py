"""What is left of the memory, read from files as Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.memory import available_bytes

pytestmark = pytest.mark.unit
MEMINFO = "MemTotal:       100 kB\nMemFree:          10 kB\nMemAvailable:     40 kB\n"


def group(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("20000\n")
    (folder / "memory.stat").write_text("anon 3\ninactive_file 5000\nactive_file 7\n")
    return folder


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 40960), ("30000", 15000), ("99999", 40960)]
)
def test_the_least_counts(tmp_path: Path, limit: str, expected: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    assert available_bytes(meminfo, group(tmp_path, limit)) == expected


def test_systems_that_do_not_tell(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) is None
    (tmp_path / "old").write_text("MemTotal: 100 kB\n")
    assert available_bytes(tmp_path / "old", tmp_path) is None
    assert available_bytes(tmp_path / "old", group(tmp_path, "30000")) == 15000
