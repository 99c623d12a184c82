"""cpu.attention against numpy, against the loops it stands in for, and against itself, in bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from profiles import RuleUse, known_rules
from profiles.cpu.attention import Attention
from serve.backends import get_backend
from serve.compiler.coverage import schedule
from serve.model.kv_pages import PAGE_SIZE, append_kernel, attend_kernel
from tests.compiler.conftest import fused_toy

pytestmark = pytest.mark.compiler

Array = NDArray[Any]
APPEND, ATTEND = "kv_pages_append", "kv_pages_attend"
LAYERS, LAYER, SCALE = 3, 1, 0.3


class Heads(NamedTuple):
    number: int
    width: int


HEADS = [
    Heads(4, 16), Heads(12, 64), Heads(3, 12), Heads(1, 4), Heads(5, 80), Heads(3, 48),
    Heads(2, 32), Heads(2, 128), Heads(1, 256),
]  # fmt: skip


def module_of(heads: Heads) -> tvm.IRModule:
    kernels = {APPEND: append_kernel(*heads), ATTEND: attend_kernel(*heads)}
    return tvm.IRModule(kernels)


def scheduled(heads: Heads, target: tvm.target.Target) -> tuple[tvm.IRModule, set[str]]:
    """The kernels as the rule makes them, and those that it took."""
    mod, coverage = schedule(
        module_of(heads), [RuleUse(known_rules()["cpu.attention"], {})], target
    )
    return mod, {entry.kernel for entry in coverage if entry.rule == "cpu.attention"}


class Kernels:
    """The model's own loops ("plain"), and what the rule makes of them ("fast")."""

    def __init__(self, heads: Heads, cpu: str | None = None) -> None:
        other = {"kind": "llvm", "mcpu": cpu}
        target = tvm.target.Target(get_backend("cpu").target() if cpu is None else other)
        plain, (fast, taken) = module_of(heads), scheduled(heads, target)
        assert taken == {APPEND, ATTEND}
        named = {
            f"{who}_{name}": mod[name].with_attr("global_symbol", f"{who}_{name}")
            for who, mod in (("plain", plain), ("fast", fast))
            for name in (APPEND, ATTEND)
        }
        self.heads = heads
        self._library = tvm.compile(tvm.IRModule(named), target=target)

    def __call__(self, name: str, *arguments: Any) -> None:
        self._library[name](*arguments)


@cache
def kernels_of(heads: Heads) -> Kernels:
    return Kernels(heads)


@pytest.fixture(params=HEADS, ids=str)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_of(request.param)


class Memory:
    """Sequences of random rows of q, k and v, in pages in disorder."""

    def __init__(self, kernels: Kernels, lengths: Sequence[int], who: str = "fast") -> None:
        heads, self._kernels, self._who = kernels.heads, kernels, who
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        order = np.random.default_rng(7).permutation(sum(counts) + 3).astype(np.int32)
        self._numbers = [order[sum(counts[:i]) :][:n] for i, n in enumerate(counts)]
        self.qkv = [random(n, 3 * heads.number, heads.width, seed=i) for i, n in enumerate(lengths)]
        # What is in a page behind the last position must not matter.
        shape = (LAYERS, len(order), heads.number)
        nothing = np.full((*shape, PAGE_SIZE * heads.width), np.nan, np.float32)
        self.keys = tvm.runtime.tensor(nothing.reshape(*shape, heads.width, PAGE_SIZE))
        self.values = tvm.runtime.tensor(nothing.reshape(*shape, PAGE_SIZE, heads.width))

    def step(self, *chunks: tuple[int, int, int]) -> list[Array]:
        """Append and attend rows of sequences, (sequence, begin, end): each chunk's output."""
        rows = [end - begin for _, begin, end in chunks]
        qkv = np.concatenate([self.qkv[i][begin:end] for i, begin, end in chunks])
        numbers = [self._numbers[i] for i, _, _ in chunks]
        offsets = np.cumsum([0, *map(len, numbers)])[:-1]
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in chunks])
        tables = (positions, np.repeat(offsets, rows), np.concatenate(numbers))
        arguments = [
            tvm.runtime.tensor(qkv), self.keys, self.values,
            *(tvm.runtime.tensor(table.astype(np.int32)) for table in tables), LAYER,
        ]  # fmt: skip
        out = tvm.runtime.tensor(np.full((len(qkv), *self._kernels.heads), np.nan, np.float32))
        self._kernels(f"{self._who}_{APPEND}", *arguments)
        self._kernels(f"{self._who}_{ATTEND}", *arguments, SCALE, out)
        return np.split(out.numpy(), np.cumsum(rows)[:-1])

    def whole(self) -> list[Array]:
        """Every sequence at once."""
        return self.step(*((i, 0, len(qkv)) for i, qkv in enumerate(self.qkv)))


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attend(qkv: Array, number: int) -> Array:
    """Causal attention in float64."""
    queries, keys, values = np.split(qkv.astype(np.float64), [number, 2 * number], axis=1)
    scores = np.einsum("qhd,khd->hqk", queries, keys) * SCALE
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: Array = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), values)
    return out


LENGTHS = (1, 15, 16, 17, 7, 40, 64, 65, 150)


@pytest.mark.parametrize("who", ["plain", "fast"])
def test_against_numpy(kernels: Kernels, who: str) -> None:
    """A packed prefill of lengths around the edges of pages, tiles and groups."""
    memory = Memory(kernels, LENGTHS, who)
    for qkv, out in zip(memory.qkv, memory.whole(), strict=True):
        np.testing.assert_allclose(out, attend(qkv, kernels.heads.number), atol=2e-5, rtol=0)


def test_append_writes_what_the_loops_write(kernels: Kernels) -> None:
    fast, plain = (Memory(kernels, LENGTHS, who) for who in ("fast", "plain"))
    for memory in (fast, plain):
        memory.whole()
    for ours, theirs in ((fast.keys, plain.keys), (fast.values, plain.values)):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
        assert np.isnan(ours.numpy()[[0, 2]]).all()  # the other layers


def bits(outputs: Sequence[Array]) -> list[bytes]:
    return [out.tobytes() for out in outputs]


def test_the_bits_are_the_same_alone_and_in_any_batch(kernels: Kernels) -> None:
    together = bits(Memory(kernels, LENGTHS).whole())
    memory = Memory(kernels, LENGTHS)
    alone = [memory.step((i, 0, length))[0] for i, length in enumerate(LENGTHS)]
    assert bits(alone) == together
    configure = tvm.get_global_func("runtime.config_threadpool")
    for num_threads in (1, 3, 2):
        configure(1, num_threads)
        assert bits(memory.whole()) == together


@pytest.mark.parametrize("seed", range(4))
def test_the_bits_are_the_same_in_any_chunks(kernels: Kernels, seed: int) -> None:
    """Each step takes a random chunk of some of the sequences; with seed 0, of one token each."""
    chance = np.random.default_rng(seed)
    memory, done = Memory(kernels, LENGTHS), [0] * len(LENGTHS)
    found: list[list[Array]] = [[] for _ in LENGTHS]
    while left := [i for i, length in enumerate(LENGTHS) if done[i] < length]:
        chosen = chance.permutation(left)[: chance.integers(1, len(left) + 1)]
        sizes = chance.integers(1, 40, len(chosen)) if seed else [1] * len(chosen)
        ends = [min(LENGTHS[i], done[i] + int(n)) for i, n in zip(chosen, sizes, strict=True)]
        chunks = [(int(i), done[i], end) for i, end in zip(chosen, ends, strict=True)]
        for (i, _, end), out in zip(chunks, memory.step(*chunks), strict=True):
            found[i].append(out)
            done[i] = end
    assert bits([np.concatenate(each) for each in found]) == bits(Memory(kernels, LENGTHS).whole())


def test_large_scores_do_not_overflow() -> None:
    """exp(300) is no float32."""
    kernels = kernels_of(HEADS[0])
    memory = Memory(kernels, (20,))
    memory.qkv[0] *= 40
    assert np.abs(memory.qkv[0][:, :8]).max() ** 2 * SCALE > 300
    [out] = memory.whole()
    np.testing.assert_allclose(out, attend(memory.qkv[0], kernels.heads.number), atol=1e-3)


@pytest.mark.parametrize(
    ("cpu", "feature"), [("x86-64", "sse2"), ("haswell", "avx2"), ("skylake-avx512", "avx512f")]
)
@pytest.mark.parametrize("heads", [Heads(3, 12), Heads(2, 64)], ids=str)
def test_other_processors(cpu: str, feature: str, heads: Heads) -> None:
    """Registers of 4, 8 and 16 lanes, 16 or 32 of them."""
    host = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")() or {}
    if not host.get(feature):
        pytest.skip(f"this processor has no {feature}")
    memory = Memory(Kernels(heads, cpu), LENGTHS)
    whole = memory.whole()
    for qkv, out in zip(memory.qkv, whole, strict=True):
        np.testing.assert_allclose(out, attend(qkv, heads.number), atol=2e-5, rtol=0)
    last = [memory.step((i, length - 1, length))[0] for i, length in enumerate(LENGTHS)]
    assert bits(last) == bits([out[-1:] for out in whole])


@pytest.mark.parametrize("heads", [Heads(2, 2), Heads(2, 6), Heads(1, 9)], ids=str)
def test_heads_it_cannot_do_are_left_as_they_are(heads: Heads) -> None:
    target = tvm.target.Target(get_backend("cpu").target())
    assert scheduled(heads, target)[1] == set()
    reason = Attention().why_not(attend_kernel(*heads), target)
    assert reason == f"no power of two from 4 on divides its head width, {heads.width}"


def test_not_on_a_gpu() -> None:
    mod, target = fused_toy("cuda")
    coverage = schedule(mod, [RuleUse(known_rules()["cpu.attention"], {})], target)[1]
    assert {entry.rule for entry in coverage} == {None}
