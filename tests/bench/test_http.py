"""The measurement of HTTP, on a workload too small to measure anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import http
from bench.docs import results
from bench.http_server import REQUEST_TOKENS

pytestmark = pytest.mark.api


def test_a_run_writes_a_report_that_can_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CONCURRENCIES", (2,))
    monkeypatch.setattr(http, "PROFILED_CONCURRENCY", 1)
    monkeypatch.setattr(http, "PROFILED_TOKENS", REQUEST_TOKENS)
    monkeypatch.setattr(http, "WORKLOAD_TOKENS", 2 * REQUEST_TOKENS)
    said: list[str] = []
    http.run(1, tmp_path / "http.json", said.append)
    report = json.loads((tmp_path / "http.json").read_text())
    [result] = report["results"]
    assert result["concurrency"] == 2
    assert result["http"]["median"] > 0
    assert result["direct"]["median"] > 0
    assert 1 <= result["tokens_per_event"] <= REQUEST_TOKENS
    assert json.loads(said[0]) == result
    seconds = [found["seconds"] for found in report["profile"]["functions"]]
    assert seconds == sorted(seconds, reverse=True)
    assert 0 < sum(seconds) <= report["profile"]["seconds"]
    assert http.table(report).startswith("| streams |")


def test_the_table() -> None:
    report = {
        "results": [
            {
                "concurrency": 4,
                "direct": {"median": 50_000.0, "min": 1.0, "max": 1.0},
                "http": {"median": 20_000.0, "min": 19_000.0, "max": 21_000.0},
                "tokens_per_event": 1.5,
            }
        ],
        "profile": {"seconds": 2.0, "functions": [{"function": "f", "calls": 3, "seconds": 0.5}]},
    }
    lines = http.table(report).splitlines()
    assert lines[2] == "| 4 | 50000 | 20000 | (19000-21000) | 30.0 µs | 1.50 |"
    assert lines[-1] == "| `f` | 3 | 25.0% |"


def test_the_results_were_measured_as_the_docs_say() -> None:
    report = results("http.json")
    assert [result["concurrency"] for result in report["results"]] == list(http.CONCURRENCIES)
    assert report["workload"]["tokens_per_request"] == REQUEST_TOKENS
