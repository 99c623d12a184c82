"""Which rule takes which kernel. Law: every shipped profile compiles."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tvm

from profiles import RuleUse, known_rules, list_profiles, load_profile, read_profile
from serve.compiler.cache import LibraryCache
from serve.compiler.compile import Compiled, get_library
from serve.compiler.coverage import KernelCoverage, panel_of, schedule
from serve.errors import CompileError
from tests.compiler.conftest import fused_toy, kernels_of, toy_job

pytestmark = pytest.mark.compiler

Fused = tuple[tvm.IRModule, tvm.target.Target]

PROFILES = sorted(list_profiles())
FUNCTIONS = {"batch_prefill", "decode", "batch_decode", "batch_verify"}
OURS = {rule_id for rule_id in known_rules() if rule_id.startswith("cpu.")}
# A block's four products and the head.
NUM_PRODUCTS = 5


@cache
def cpu_module_of(profile: str) -> Fused:
    """The toy as the profile has it: its weights' layout and its KV cache follow from the rules."""
    return fused_toy("cpu", profile)


@pytest.fixture(scope="module")
def cpu_module() -> Fused:
    return cpu_module_of("baseline")


@pytest.fixture(scope="module")
def cuda_module() -> Fused:
    return fused_toy("cuda")


def copy(mod: tvm.IRModule) -> tvm.IRModule:
    return tvm.IRModule(dict(mod.functions_items()), attrs=mod.attrs)


def is_product(kernel: str) -> bool:
    return "matmul" in kernel


def rules_of(coverage: list[KernelCoverage], called_by: str | None = None) -> dict[str, str | None]:
    """Kernel -> rule, for what nobody had scheduled by hand."""
    return {
        entry.kernel: entry.rule
        for entry in coverage
        if not entry.as_written and (called_by is None or called_by in entry.called_by)
    }


def from_manifest(entry: Mapping[str, Any]) -> KernelCoverage:
    return KernelCoverage(**{**entry, "called_by": tuple(entry["called_by"])})


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_compiles_for_the_cpu(name: str, cache: LibraryCache) -> None:
    manifest = get_library(toy_job(name), cache).library.manifest
    coverage = [from_manifest(entry) for entry in manifest.coverage]

    kernels = [entry.kernel for entry in coverage]
    assert kernels == sorted(kernels)
    assert len(set(kernels)) == len(kernels)
    mod, target = cpu_module_of(name)  # what the child did is what the rules do here
    assert set(kernels) == kernels_of(mod)
    own = {"create_paged_kv_cache"} if manifest.kv_cache == "tvm" else set()
    own |= {"pack"} if manifest.packed else set()
    assert {caller for entry in coverage for caller in entry.called_by} == FUNCTIONS | own
    assert all(entry.called_by for entry in coverage)
    assert all(entry.rule is None for entry in coverage if entry.as_written)
    known = [rule["id"] for rule in manifest.rules]
    assert {entry.rule for entry in coverage} <= {None, *known}

    rules = load_profile(name).rules_for("cpu", "cpu")
    assert schedule(copy(mod), rules, target)[1] == coverage


def cpu_rules(name: str) -> list[KernelCoverage]:
    mod, target = cpu_module_of(name)
    return schedule(copy(mod), load_profile(name).rules_for("cpu", "cpu"), target)[1]


@pytest.mark.parametrize("name", ["baseline", "stock"])
def test_cpu_profiles_without_rules_take_nothing(name: str) -> None:
    assert set(rules_of(cpu_rules(name)).values()) == {None}


def test_every_product_on_the_cpu_has_its_rule() -> None:
    """One row's is cpu.gemv's: those of decode, and no other."""
    coverage = {name: cpu_rules(name) for name in ("matmul", "gemv", "full")}
    products = {kernel for kernel in rules_of(coverage["full"]) if is_product(kernel)}
    of_decode = {kernel for kernel in rules_of(coverage["full"], "decode") if is_product(kernel)}
    assert (len(products), len(of_decode)) == (3 * NUM_PRODUCTS, NUM_PRODUCTS)

    def by(profile: str, rule_id: str) -> set[str]:
        return {kernel for kernel, rule in rules_of(coverage[profile]).items() if rule == rule_id}

    for profile in ("gemv", "full"):
        assert by(profile, "cpu.gemv") == of_decode
    for profile in ("matmul", "full"):
        assert by(profile, "cpu.matmul") == products - of_decode


def test_cpu_reduction_takes_the_layer_norms() -> None:
    rules = rules_of(cpu_rules("reduction"))
    norms = {kernel: rule for kernel, rule in rules.items() if kernel.startswith("layer_norm")}
    assert len(norms) == 3  # decode's, batch_decode's, and prefill's and verify's
    assert set(norms.values()) == {"cpu.reduction"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "activation_function": "silu", "n_layer": 1},
        {"n_embd": 48, "n_head": 3, "n_inner": 100, "vocab_size": 501, "n_layer": 1},
        {"n_embd": 80, "n_head": 1, "activation_function": "gelu", "n_layer": 1},
    ],
    ids=str,
)
def test_full_leaves_no_kernel_unscheduled_on_the_cpu(changes: dict[str, Any]) -> None:
    """Of the toy, and of models whose every width is odd."""
    mod, target = fused_toy("cpu", "full", **changes)
    coverage = schedule(mod, load_profile("full").rules_for("cpu", "cpu"), target)[1]
    assert [entry.kernel for entry in coverage if entry.rule is None] == []
    assert {entry.rule for entry in coverage} == OURS


def test_every_rule_says_why_it_declined(compiled: tuple[Compiled, list[str]]) -> None:
    """In the manifest, of each kernel, every rule before the one that took it."""
    ids = [rule["id"] for rule in compiled[0].library.manifest.rules]
    for entry in compiled[0].library.manifest.coverage:
        before = ids[: ids.index(entry["rule"])]
        # The kernels that the model marks as scheduled are offered to who asks for such alone.
        expected = [] if entry["rule"] == "cpu.attention" else before
        assert entry["declined"].keys() == set(expected)
        assert all(entry["declined"].values())
    by_kernel = {entry["kernel"]: entry for entry in compiled[0].library.manifest.coverage}
    reasons = {
        by_kernel[kernel]["declined"]["cpu.matmul"]
        for kernel, entry in by_kernel.items()
        if entry["rule"] == "cpu.gemv"
    }
    assert reasons == {"it has a single row: that is cpu.gemv's"}


@pytest.mark.parametrize("name", ["reduction", "full"])
def test_cpu_attention_takes_our_pages(name: str) -> None:
    """Though the model marks the kernels as scheduled; and none of TVM's are there."""
    coverage = cpu_rules(name)
    taken = {entry.kernel for entry in coverage if entry.rule == "cpu.attention"}
    assert taken == {"kv_pages_append", "kv_pages_attend"}
    assert not any(entry.as_written for entry in coverage)


@pytest.mark.parametrize("name", ["baseline", "stock", "matmul", "gemv"])
def test_other_profiles_keep_tvms_attention(name: str) -> None:
    kernels = kernels_of(cpu_module_of(name)[0])
    assert "batch_prefill_paged_kv_cpu" in kernels
    assert "kv_pages_attend" not in kernels


def gpu_rules(name: str, mod: tvm.IRModule, target: tvm.target.Target) -> list[KernelCoverage]:
    return schedule(copy(mod), load_profile(name).rules_for("cuda", "gpu"), target)[1]


@pytest.mark.parametrize("name", PROFILES)
def test_cuda_leaves_no_kernel_unscheduled(name: str, cuda_module: Fused) -> None:
    """A GPU kernel that binds no threads does not compile. (This needs no nvcc, and no GPU.)"""
    coverage = gpu_rules(name, *cuda_module)
    assert {entry.kernel for entry in coverage} == kernels_of(cuda_module[0])
    assert None not in rules_of(coverage).values()
    ids = {use.rule.id for use in load_profile(name).rules_for("cuda", "gpu")}
    assert set(rules_of(coverage).values()) <= ids


def test_every_rung_on_cuda_takes_what_its_name_says(
    cuda_module: Fused,
) -> None:
    taken = {name: rules_of(gpu_rules(name, *cuda_module)) for name in PROFILES}
    coverage = gpu_rules("full", *cuda_module)
    products = {kernel for kernel in rules_of(coverage) if is_product(kernel)}
    of_decode = {kernel for kernel in rules_of(coverage, "decode") if is_product(kernel)}
    norms = {kernel for kernel in rules_of(coverage) if kernel.startswith("layer_norm")}
    assert (len(products), len(of_decode), len(norms)) == (3 * NUM_PRODUCTS, NUM_PRODUCTS, 3)

    def by(profile: str, *rule_ids: str) -> set[str]:
        return {kernel for kernel, rule in taken[profile].items() if rule in rule_ids}

    assert by("baseline", "dl.gpu.Fallback") == set(taken["baseline"])
    assert by("matmul", "dl.gpu.Matmul") == products - of_decode
    assert by("gemv", "dl.gpu.GEMV") == of_decode
    # Products are sums too, and some of them go to this rung's rules.
    reductions = by("reduction", "dl.gpu.Reduction", "dl.gpu.GeneralReduction")
    assert norms | of_decode <= reductions <= norms | products
    for profile in ("full", "stock"):
        assert by(profile, "dl.gpu.Matmul") == products - of_decode
        assert by(profile, "dl.gpu.GEMV") == of_decode
        assert by(profile, "dl.gpu.GeneralReduction", "dl.gpu.Reduction") == norms
    assert taken["full"] == taken["stock"]


def test_the_first_rule_that_takes_a_kernel_wins(
    cpu_module: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    mod, target = cpu_module
    offered: dict[str, int] = {"one": 0, "two": 0}

    class Rule:
        def __init__(self, name: str, takes_all: bool) -> None:
            self.name, self.takes_all = name, takes_all

        def apply(self, func: Any, asked: Any, _: bool) -> Any:
            assert asked == target == tvm.target.Target.current()
            offered[self.name] += 1
            return [tvm.s_tir.Schedule(func)] if self.takes_all else None  # a design space

    uses = [
        RuleUse(known_rules()["cpu.gemv"], {"name": "one", "takes_all": False}),
        RuleUse(known_rules()["dl.cpu.GEMV"], {"name": "two", "takes_all": True}),
        RuleUse(known_rules()["dl.cpu.Reduction"], {"name": "three", "takes_all": True}),
    ]
    monkeypatch.setattr("profiles.rules.Rule.build", lambda _, values: Rule(**values))
    scheduled, coverage = schedule(copy(mod), uses, target)
    rules = rules_of(coverage)
    assert set(rules.values()) == {"dl.cpu.GEMV"}
    assert offered == {"one": len(rules), "two": len(rules)}
    assert kernels_of(scheduled) == kernels_of(mod)
    # All are marked now, so that a second round offers them only to who asks for such.
    assert all(entry.as_written for entry in schedule(scheduled, uses, target)[1])
    monkeypatch.setattr(Rule, "takes_scheduled", True, raising=False)
    again = schedule(scheduled, uses, target)[1]
    assert {(entry.rule, entry.as_written) for entry in again} == {("dl.cpu.GEMV", False)}


def test_a_rule_that_fails_is_named_with_the_kernel(
    cpu_module: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    mod, target = cpu_module

    class Failing:
        def apply(self, *_: Any) -> Any:
            raise RuntimeError("no such loop")

    monkeypatch.setattr("profiles.rules.Rule.build", lambda *_: Failing())
    with pytest.raises(CompileError, match=r"^rule cpu\.gemv failed on kernel \w+: no such loop"):
        schedule(copy(mod), load_profile("gemv").rules_for("cpu", "cpu"), target)


def test_a_rule_that_cannot_be_made_is_named(
    cpu_module: Fused, monkeypatch: pytest.MonkeyPatch
) -> None:
    mod, target = cpu_module

    def broken(*_: Any) -> Any:
        raise ImportError("no module named that")

    monkeypatch.setattr("profiles.rules.Rule.build", broken)
    problem = r"^rule cpu\.gemv \(profiles\.cpu\.gemv:GEMV\) is broken: no module named that"
    with pytest.raises(CompileError, match=problem):
        schedule(copy(mod), load_profile("gemv").rules_for("cpu", "cpu"), target)


def cpu_target(mcpu: str) -> tvm.target.Target:
    return tvm.target.Target({"kind": "llvm", "mcpu": mcpu})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("full", 64), ("matmul", 64), ("gemv", 64), ("baseline", None), ("reduction", None)],
)
def test_weights_are_packed_for_products_of_our_own(name: str, expected: int | None) -> None:
    rules = load_profile(name).rules_for("cpu", "cpu")
    assert panel_of(rules, cpu_target("skylake-avx512")) == expected


def test_rules_that_want_panels_of_different_widths() -> None:
    def use(rule_id: str, vectors: int) -> RuleUse:
        values = {p.name: p.default for p in known_rules()[rule_id].parameters}
        return RuleUse(known_rules()[rule_id], values | {"vectors": vectors})

    target = cpu_target("haswell")
    assert panel_of([use("cpu.matmul", 3), use("cpu.gemv", 3)], target) == 24
    assert panel_of([use("cpu.matmul", 0), use("cpu.gemv", 2)], target) == 16
    with pytest.raises(CompileError, match="panels of different widths") as caught:
        panel_of([use("cpu.matmul", 3), use("cpu.gemv", 0)], target)
    assert "'cpu.matmul': 24" in str(caught.value)
    assert "'cpu.gemv': 16" in str(caught.value)


def test_it_is_an_error_of_the_profile(tmp_path: Path, cache: LibraryCache) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        '[cpu]\nrules = ["cpu.matmul", "cpu.gemv"]\n[cpu.parameters."cpu.matmul"]\nvectors = 3\n'
    )
    with pytest.raises(CompileError, match="panels of different widths") as caught:
        get_library(toy_job(read_profile(path)), cache)
    assert "cpu.matmul" in caught.value.log
    assert "cpu.gemv" in caught.value.log
