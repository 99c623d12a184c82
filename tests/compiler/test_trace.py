"""Where the time goes: the work of whole phases, shares, the roof, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serve import trace, trace_table
from serve.backends import get_backend
from serve.config import Settings, load_settings
from serve.roof import Roof, measure_roof
from serve.runtime.instrument import cache_kernels
from tests.models import write_model

pytestmark = pytest.mark.compiler

LAYERS, HEADS, WIDTH, VOCAB = 2, 4, 256, 1000
PROMPT, STEPS = 40, 3
small_roof = partial(measure_roof, steps=100, buffer_bytes=1 << 20, matmul_size=64, repetitions=1)

Report = dict[str, Any]
Trace = Callable[[str], tuple[Report, list[str]]]


def settings_for(model: Path, profile: str) -> Settings:
    flags = {"model.source": str(model), "library.profile": profile}
    return load_settings(None, {}, flags | {"library.cache_dir": str(model.parent / "cache")})


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The report and the printed lines of a toy's trace under a profile."""
    shape = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": VOCAB}
    folder = write_model(tmp_path_factory.mktemp("model") / "toy", **shape)  # type: ignore[arg-type]
    known: dict[str, tuple[Report, list[str]]] = {}

    def run(profile: str) -> tuple[Report, list[str]]:
        if profile not in known:
            lines: list[str] = []
            file = folder.parent / f"{profile}.json"
            options = trace.Options(2, PROMPT, STEPS, repetitions=1, json_file=file)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trace, "measure_roof", small_roof)
                trace.run(options, settings_for(folder, profile), lines.append)
            known[profile] = json.loads(file.read_text()), lines
        return known[profile]

    return run


def phase(report: Report, name: str) -> Report:
    found: Report = next(p for p in report["phases"] if p["phase"] == name)
    return found


@pytest.mark.parametrize("profile", ["full", "baseline"])
def test_the_flop_of_a_phase_are_the_models(traced: Trace, profile: str) -> None:
    """2 for each parameter of a product and token, 4 for each channel and visible key, the head."""
    report, _ = traced(profile)
    matrices = LAYERS * 12 * WIDTH * WIDTH
    for name, tokens, keys in (
        ("prefill", PROMPT, PROMPT * (PROMPT + 1) // 2),
        ("decode", STEPS, sum(range(PROMPT + 1, PROMPT + STEPS + 1))),
    ):
        logits = 1 if name == "prefill" else STEPS
        expected = 2 * (
            2 * matrices * tokens + LAYERS * 4 * WIDTH * keys + 2 * WIDTH * VOCAB * logits
        )
        flop = sum(row["flop"] for row in phase(report, name)["kernels"])
        assert expected <= flop <= 1.02 * expected


@pytest.mark.parametrize("profile", ["full", "baseline"])
def test_times_and_shares_add_up(traced: Trace, profile: str) -> None:
    report, _ = traced(profile)
    assert [p["phase"] for p in report["phases"]] == ["prefill", "decode"]
    assert [p["steps"] for p in report["phases"]] == [2, STEPS]  # two prompts
    for each in report["phases"]:
        outside = each["outside_seconds"]
        assert outside > 0
        assert each["plain_seconds"] > 0
        rows = each["kernels"]
        assert sum(row["seconds"] for row in rows) + outside == pytest.approx(each["seconds"])
        shares = sum(row["share"] for row in rows) + outside / each["seconds"]
        assert shares == pytest.approx(1)
        assert rows == sorted(rows, key=lambda row: -row["seconds"])
        for row in rows:
            assert row["bytes"] == row["bytes_read"] + row["bytes_written"] > 0
            assert row["gflops"] == pytest.approx(row["flop"] / row["seconds"] / 1e9)
            assert row["roof_fraction"] == pytest.approx(row["roof_seconds"] / row["seconds"])


def test_tvms_cache_shows_its_kernels(traced: Trace) -> None:
    report, _ = traced("baseline")
    attention = {"prefill": "batch_prefill_ragged_kv", "decode": "batch_decode_paged_kv_cpu"}
    for name, kernel in attention.items():
        calls = {row["kernel"]: row["calls"] for row in phase(report, name)["kernels"]}
        steps = phase(report, name)["steps"]
        for own in (kernel, "fused_rope", "tir_kv_cache_transpose_append"):
            assert calls[own] == LAYERS * steps


def test_every_kernel_has_its_rule(traced: Trace) -> None:
    full, baseline = (traced(profile)[0] for profile in ("full", "baseline"))
    products = [row for p in full["phases"] for row in p["kernels"] if "matmul" in row["kernel"]]
    assert {row["rule"] for row in products} == {"cpu.matmul"}  # two sequences decode together
    assert {row["rule"] for p in baseline["phases"] for row in p["kernels"]} == {None}


def test_the_report_says_where_it_is_from(traced: Trace) -> None:
    report, lines = traced("full")
    assert {"machine", "versions", "commit", "date", "workload", "roof"} <= report.keys()
    workload = report["workload"]
    assert (workload["profile"], workload["batch"], workload["threads"] > 0) == ("full", 2, True)
    table = trace_table.table(report)
    assert lines[-len(table) :] == table


def test_small_kernels_share_a_line_unless_all_are_wanted(traced: Trace) -> None:
    report, _ = traced("full")
    row = phase(report, "prefill")["kernels"][0]
    small = [row | {"kernel": f"small{i}", "share": 0.001} for i in range(3)]
    part = phase(report, "prefill") | {"kernels": [row | {"share": 0.9}, *small]}
    folded = trace_table.table(report | {"phases": [part]})
    whole = trace_table.table(report | {"phases": [part]}, show_all=True)
    assert any(line.startswith("others (3 kernels) ") for line in folded)
    assert not any("small" in line for line in folded)
    assert sum("small" in line for line in whole) == 3


def test_the_roof() -> None:
    roof = small_roof(get_backend("cpu"))
    for figure in (roof.fma_gflops, roof.matmul_gflops, roof.read_gbps):
        assert 0.01 < figure < 1e6
    assert roof.gflops == max(roof.fma_gflops, roof.matmul_gflops)


def test_the_roof_of_a_kernel() -> None:
    roof = Roof(fma_gflops=100.0, matmul_gflops=80.0, read_gbps=10.0)
    assert roof.seconds(1e9, 1e6) == pytest.approx(0.01)  # arithmetic is the limit
    assert roof.seconds(1e6, 1e9) == pytest.approx(0.1)  # memory is
    assert roof.best(Roof(90.0, 85.0, 11.0)) == Roof(100.0, 85.0, 11.0)


def test_the_kernels_of_a_cache_are_read_from_the_code_that_makes_it() -> None:
    code = """
@create:
  call  vm.builtin.make_tuple in: c[22], f[decode] dst: %7
  call  vm.builtin.make_tuple in:              dst: %8
  call  vm.builtin.paged_attention_kv_cache_create in: %6, i4, f[append], %7, %8 dst: %9
"""
    assert cache_kernels(code) == [[], [], ["append"], ["decode"], []]
    assert cache_kernels("@main:\n  ret %1\n") == []
