"""Real `locust --headless` runs against a stand-in host: rows and units, failures, options."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.loadtest.stand_in import (
    Reply,
    StandIn,
    event,
    good_parts,
    json_reply,
    model_list,
    token,
    usage,
)

pytestmark = pytest.mark.loadtest

ROOT = Path(__file__).resolve().parents[2]
REQUEST = ("POST", "whole request ms")
FIRST_TOKEN = ("metric", "time to first token ms")
PREFILL = ("metric", "prefill tok/s")
DECODE = ("metric", "decode tok/s")
AGGREGATED = ("", "Aggregated")


@dataclass(frozen=True)
class Run:
    """What one Locust run left behind."""

    code: int
    output: str
    rows: dict[tuple[str, str], dict[str, str]]  # by (Type, Name)
    failures: dict[str, int]  # occurrences by error
    stats: list[dict[str, Any]]  # --json-file

    def number(self, row: tuple[str, str], column: str) -> float:
        return float(self.rows[row][column])

    def count(self, row: tuple[str, str]) -> int:
        return int(self.rows[row]["Request Count"])

    def lowest(self, row: tuple[str, str]) -> float:
        return self.number(row, "Min Response Time")

    def highest(self, row: tuple[str, str]) -> float:
        return self.number(row, "Max Response Time")

    def average(self, row: tuple[str, str]) -> float:
        return self.number(row, "Average Response Time")


def locust(folder: Path, host: str, *options: str, seconds: int = 2, **environment: str) -> Run:
    """Run two users for some seconds; the requests under way at the end may finish."""
    command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless"]
    command += ["-u", "2", "-r", "2", "-t", f"{seconds}s", "--stop-timeout", "30"]
    command += ["--host", host, "--csv", str(folder / "out"), "--json-file", str(folder / "out")]
    done = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return Run(done.returncode, done.stdout, *_csv_files(folder), _json_file(folder))


def _csv_files(folder: Path) -> tuple[dict[tuple[str, str], dict[str, str]], dict[str, int]]:
    rows = {(row["Type"], row["Name"]): row for row in _csv(folder / "out_stats.csv")}
    failures = _csv(folder / "out_failures.csv")
    return rows, {row["Error"]: int(row["Occurrences"]) for row in failures}


def _csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _json_file(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out.json"
    return json.loads(path.read_text()) if path.exists() else []


def test_the_rows_their_units_and_their_counts(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], _index: int) -> Reply:
        return Reply(good_parts(body, 0.05, 0.001, num_cached=22))

    with StandIn(reply) as server:
        run = locust(tmp_path, server.url)
    assert run.code == 0, run.output
    assert run.failures == {}
    assert set(run.rows) == {REQUEST, FIRST_TOKEN, PREFILL, DECODE, AGGREGATED}

    # As many samples in each row as requests were served, and no metric in the total.
    assert server.num_served > 2
    assert {run.count(row) for row in run.rows} == {server.num_served}
    assert run.average(AGGREGATED) == run.average(REQUEST)

    # Milliseconds: the host slept 50 ms before the first token, and 1 ms before 63 more.
    assert run.lowest(FIRST_TOKEN) >= 50
    assert run.lowest(REQUEST) >= 50 + 63

    # Tokens per second: 300 of the 322 prompt tokens were computed, in the time to first token.
    assert run.highest(PREFILL) == pytest.approx(300 * 1000 / run.lowest(FIRST_TOKEN))
    assert run.lowest(PREFILL) == pytest.approx(300 * 1000 / run.highest(FIRST_TOKEN))

    # A request is its first token and then its 63 others (and 1/mean <= mean of 1/x).
    decode_ms = 63 * 1000 / run.average(DECODE)
    assert run.average(FIRST_TOKEN) + decode_ms <= run.average(REQUEST)

    # Three digits in medians and in the JSON's buckets.
    for row in (REQUEST, FIRST_TOKEN, PREFILL, DECODE):
        median = run.number(row, "Median Response Time")
        assert run.lowest(row) <= median <= run.highest(row)
    buckets = [float(key) for entry in run.stats for key in entry["response_times"]]
    assert {entry["name"] for entry in run.stats} == {name for _, name in run.rows} - {"Aggregated"}
    assert buckets == [float(f"{bucket:.3g}") for bucket in buckets]

    # What was sent.
    bodies = [received.body for received in server.received]
    assert {body["model"] for body in bodies} == {"gpt2"}
    assert {len(body["prompt"]) for body in bodies} == {322}
    assert {body["max_tokens"] for body in bodies} == {64}
    assert len({body["cache_salt"] for body in bodies}) == len(bodies)
    assert {received.authorization for received in server.received} == {None}
    assert server.num_model_requests == 2  # one a user


WRONG: dict[str, Reply] = {
    "HTTP 503: draining": json_reply({"error": {"message": "draining"}}, 503),
    "error within the stream: over timeout": Reply(
        [token(), event({"error": {"message": "over timeout"}})]
    ),
    "the stream ended without [DONE]": Reply([token(), token("b", "length"), usage(322, 64)]),
    "connection ended within the answer": Reply([token()], cut=True),
    "the stream has no usage": Reply([token(), 0.01, token("b", "length"), event("[DONE]")]),
    "asked for 64 tokens, the host generated 63": Reply(
        [token(), 0.01, token("b", "length"), usage(322, 63), event("[DONE]")]
    ),
}


def test_what_is_wrong_is_a_failure_and_never_a_statistic(tmp_path: Path) -> None:
    wrong = list(WRONG.values())

    def reply(body: dict[str, Any], index: int) -> Reply:
        return wrong[index] if index < len(wrong) else Reply(good_parts(body, 0.05))

    with StandIn(reply) as server:
        run = locust(tmp_path, server.url, seconds=6)
    assert run.code == 1
    assert all(any(message in error for error in run.failures) for message in WRONG), run.failures
    assert run.failures == dict.fromkeys(run.failures, 1)
    assert len(run.failures) == len(WRONG)

    assert run.count(REQUEST) == len(server.received)
    assert int(run.rows[REQUEST]["Failure Count"]) == len(WRONG)
    num_good = run.count(REQUEST) - len(WRONG)
    assert num_good > 0
    assert {run.count(row) for row in (FIRST_TOKEN, PREFILL, DECODE)} == {num_good}
    assert run.lowest(REQUEST) >= 50  # the failed ones were faster


def test_options_reach_the_host(tmp_path: Path) -> None:
    with StandIn(lambda body, _: Reply(good_parts(body, 0.01)), model_list("vllm")) as server:
        options = ["--model", "other", "--prompt-tokens", "400", "--decode-tokens", "1"]
        run = locust(tmp_path, server.url, *options, "--share-prefix", LOADTEST_API_KEY="sesame")
    assert run.code == 0, run.output
    assert "sesame" not in run.output
    for received in server.received:
        assert received.authorization == "Bearer sesame"
        assert received.body["model"] == "other"
        assert len(received.body["prompt"]) == 400
        assert received.body["max_tokens"] == 1
        assert "cache_salt" not in received.body
    assert set(run.rows) == {REQUEST, FIRST_TOKEN, PREFILL, AGGREGATED}  # one token: no decode
    assert run.highest(PREFILL) == pytest.approx(400 * 1000 / run.lowest(FIRST_TOKEN))


def test_another_kind_of_host_gets_no_salt_and_the_user_is_told_once(tmp_path: Path) -> None:
    with StandIn(lambda body, _: Reply(good_parts(body, 0.05)), model_list("acme")) as server:
        run = locust(tmp_path, server.url)
    assert run.code == 0, run.output
    assert server.num_model_requests == 2
    assert all("cache_salt" not in received.body for received in server.received)
    assert run.output.count("prefill tok/s are inflated") == 1


def test_a_host_without_models_fails_and_sends_nothing(tmp_path: Path) -> None:
    with StandIn(lambda body, _: Reply(good_parts(body)), json_reply({"data": []})) as server:
        run = locust(tmp_path, server.url)
    assert run.code == 1
    assert all("lists no model" in error for error in run.failures)
    assert set(run.rows) == {("GET", "/v1/models"), AGGREGATED}
    assert server.received == []


@pytest.mark.parametrize(
    ("host", "options", "message"),
    [
        ("http://127.0.0.1:9", ["--decode-tokens", "0"], "at least 1, not '0'"),
        ("http://127.0.0.1:9", ["--prompt-tokens", "x"], "at least 1, not 'x'"),
        ("http://127.0.0.1:9", ["--api-key", "a\nb"], "expected printable ASCII"),
        ("127.0.0.1:9", [], "expected http://host:port"),
    ],
)
def test_a_wrong_option_ends_the_run(
    tmp_path: Path, host: str, options: list[str], message: str
) -> None:
    run = locust(tmp_path, host, *options)
    assert message in run.output
    assert run.code != 0
