"""Ours and transformers for real, on a tiny model: the whole way to the report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.peers.checkpoint import SHAPES, checkpoint
from bench.peers.contestant import Contestant
from bench.peers.driver import Subject, measure
from bench.peers.jobs import Job, Metric
from bench.peers.server_start import start_seconds

pytestmark = pytest.mark.parity

ALONE, TOGETHER = Job(1, 40, 4), Job(3, 40, 4)


def test_both_compute_the_same_and_are_measured(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLIGHT_CACHE_DIR", str(cache))
    subject = Subject(
        "tiny",
        checkpoint("tiny", tmp_path),
        SHAPES["tiny"].vocab_size,
        64,
        (
            Metric("prefill", "prefill", ALONE, "prefill"),
            Metric("decode", "decode", ALONE, "decode"),
        ),
        (Metric("at_once_3", "3 at once", TOGETHER, "at_once"),),
        check_prompts=(5, 40),
    )
    contestants = [
        Contestant(name, name, sys.executable, 2, 120.0, tmp_path / "logs")
        for name in ("ours", "transformers")
    ]
    found = measure(subject, contestants, 1, tmp_path, lambda _: None)
    for engine in found["engines"].values():
        assert engine["error"] is None
        assert engine["check"]["agrees"] is True
        assert engine["check"]["tokens_equal_at_once"] == {"3": 1.0}
        assert engine["rates"].keys() == {"prefill", "decode", "at_once_3"}
    ours = found["engines"]["ours"]["settings"]
    assert ours["alone"]["kv_cache_bytes"] == 64 * SHAPES["tiny"].kv_bytes_per_token()
    assert start_seconds(subject.folder, {}) > 0
