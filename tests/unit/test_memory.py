"""What is left of the memory, read from files as Linux has them, and what of it is promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.memory import Claims, Variant, available_bytes, resident_bytes

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


def test_what_this_process_has(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t   90 kB\nRssAnon:\t      70 kB\n")
    assert resident_bytes(status) == 70 * 1024
    assert resident_bytes(tmp_path / "none") is None


def test_systems_that_do_not_tell(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path) is None
    (tmp_path / "old").write_text("MemTotal: 100 kB\n")
    assert available_bytes(tmp_path / "old", tmp_path) is None
    assert available_bytes(tmp_path / "old", group(tmp_path, "30000")) == 15000


class System:
    """100 bytes, of which `taken` are taken, all by this process."""

    def __init__(self) -> None:
        self.taken = 10
        self.claims = Claims(lambda: 100 - self.taken, lambda: self.taken)


def test_what_was_promised_is_not_promised_again() -> None:
    system = System()
    claims = system.claims
    assert claims.claim("a", {"weights": 20, "a": 40})
    assert claims.room() == (90, 60)
    assert not claims.claim("b", {"weights": 20, "b": 31})
    system.taken += 50  # promises kept are no longer available
    assert claims.room() == (40, 10)
    assert not claims.claim("b", {"b": 31})
    assert claims.claim("b", {"weights": 20, "b": 30})  # the same weights
    system.taken += 60  # more than was claimed
    assert claims.room() == (-20, 0)


def test_a_claim_takes_the_place_of_its_owner_s_last() -> None:
    claims = System().claims
    assert claims.claim("a", {"weights": 60})
    assert claims.claim("a", {"packed weights": 60})
    assert claims.parts() == {"packed weights": 60}
    assert not claims.claim("a", {"packed weights": 91})
    assert claims.parts() == {}


UNKNOWN, PLAIN, PACKED = (Variant("weights", form) for form in (None, "plain", "packed"))


def test_a_form_not_known_yet_is_no_more_memory() -> None:
    claims = System().claims
    assert claims.claim("a", {UNKNOWN: 50, "a": 10})
    assert claims.claim("b", {UNKNOWN: 50, "b": 10})
    assert claims.claim("a", {PACKED: 50, "a": 10})  # b still does not know
    assert claims.room() == (90, 70)
    assert claims.claim("c", {UNKNOWN: 50, "c": 10})  # after a knows
    assert claims.claim("b", {PACKED: 50, "b": 10})
    assert claims.parts() == {PACKED: 50, "a": 10, "b": 10, "c": 10}
    assert not claims.claim("d", {Variant("others", None): 11})
    for owner in "ab":
        claims.end(owner)
    assert claims.parts() == {UNKNOWN: 50, "c": 10}


def test_two_known_forms_are_twice_the_memory() -> None:
    claims = System().claims
    assert claims.claim("a", {PLAIN: 40})
    assert claims.claim("b", {UNKNOWN: 40})
    assert (claims.new({PACKED: 40}), claims.new({PLAIN: 40})) == (40, 0)
    assert claims.claim("b", {PACKED: 40})
    assert claims.claim("c", {UNKNOWN: 40})
    assert claims.parts() == {PLAIN: 40, PACKED: 40}
    assert not claims.claim("d", {Variant("weights", "other"): 40})


def test_a_promise_ends() -> None:
    system = System()
    assert system.claims.claim("a", {"weights": 20, "a": 40})
    assert system.claims.claim("b", {"weights": 20, "b": 30})
    system.claims.end("a")
    system.claims.end("a")
    assert system.claims.parts() == {"weights": 20, "b": 30}
    system.claims.end("b")
    system.taken = 30  # not all is given back; it keeps no promise of the next
    assert system.claims.claim("c", {"c": 70})
    assert system.claims.room() == (70, 70)


def test_where_nothing_is_known_all_fits() -> None:
    for claims in (Claims(lambda: None, lambda: 1), Claims(lambda: 1, lambda: None)):
        assert claims.claim("a", {"a": 10**15})
        assert claims.room() is None
