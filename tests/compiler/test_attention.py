"""cpu.attention against numpy, and against the kernels of TVM that it stands in for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from profiles import RuleUse, known_rules
from serve.backends import get_backend
from serve.compiler.coverage import schedule
from serve.compiler.pipeline import fuse
from serve.model.config import GPT2Config
from serve.model.gpt2 import PAGE_SIZE, export
from tests.compiler.conftest import fused_toy

pytestmark = pytest.mark.compiler

Array = NDArray[Any]

DECODE, PAGED, RAGGED = (
    "batch_decode_paged_kv_cpu",
    "batch_prefill_paged_kv_cpu",
    "batch_prefill_ragged_kv",
)
KERNELS = (DECODE, PAGED, RAGGED)
SCALE = 0.3
NO_SCORE = -5e4  # the logarithm of the sum over no keys, for TVM


class Heads(NamedTuple):
    number: int
    width: int


class Kernels:
    """TVM's three kernels, and what the rule makes of them."""

    def __init__(self, heads: Heads) -> None:
        config = GPT2Config(
            vocab_size=64,
            n_positions=64,
            n_embd=heads.number * heads.width,
            n_head=heads.number,
            n_layer=1,
            n_inner=16,
        )
        target = tvm.target.Target(get_backend("cpu").target())
        with target:
            mod = fuse(export(config)[0])
        theirs = {name: mod[name] for name in KERNELS}
        mod, coverage = schedule(mod, [RuleUse(known_rules()["cpu.attention"], {})], target)
        self.heads = heads
        self.taken = {entry.kernel for entry in coverage if entry.rule == "cpu.attention"}
        named = {
            f"{who}_{name}": func.with_attr("global_symbol", f"{who}_{name}")
            for who, funcs in (("ours", mod), ("theirs", theirs))
            for name, func in ((name, funcs[name]) for name in KERNELS)
        }
        self._library = tvm.compile(tvm.IRModule(named), target=target)

    def __call__(self, who: str, name: str, num_queries: int, *inputs: Any) -> tuple[Array, Array]:
        """The output and its lse: base-2 logarithms of the sums of weights."""
        arrays = [value for value in inputs if isinstance(value, np.ndarray)]
        numbers = [value for value in inputs if not isinstance(value, np.ndarray)]
        out = tvm.runtime.tensor(np.full((num_queries, *self.heads), np.nan, np.float32))
        lse = tvm.runtime.tensor(np.full((num_queries, self.heads.number), np.nan, np.float32))
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        rope = (1.0, 10000.0)
        *causal, rotary_mode = numbers
        self._library[f"{who}_{name}"](*tensors, out, lse, *causal, rotary_mode, *rope, SCALE)
        return out.numpy(), lse.numpy()


HEADS = [Heads(4, 16), Heads(12, 64), Heads(3, 12), Heads(1, 4), Heads(5, 80), Heads(2, 256)]


@cache
def kernels_of(heads: Heads) -> Kernels:
    return Kernels(heads)


@pytest.fixture(params=HEADS, ids=str)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_of(request.param)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def int32(*values: int) -> Array:
    return np.array(values, np.int32)


def starts(lengths: Sequence[int]) -> Array:
    return np.cumsum([0, *lengths], dtype=np.int32)


class Pages:
    """Keys and values of these lengths, over pages in disorder."""

    def __init__(self, heads: Heads, lengths: Sequence[int]) -> None:
        self.keys = [random(n, *heads, seed=10 + i) for i, n in enumerate(lengths)]
        self.values = [random(n, *heads, seed=90 + i) for i, n in enumerate(lengths)]
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        self.indptr = starts(counts)
        order = np.random.default_rng(7).permutation(sum(counts) + 3)
        self.numbers = order[: sum(counts)].astype(np.int32)
        last = [n - max(0, count - 1) * PAGE_SIZE for n, count in zip(lengths, counts, strict=True)]
        self.last = int32(*last)
        # What is in a page behind the last position must not matter.
        shape = (len(order), 2, heads.number, PAGE_SIZE, heads.width)
        self.pages = np.full(shape, np.nan, np.float32)
        for index, pair in enumerate(zip(self.keys, self.values, strict=True)):
            for position in range(lengths[index]):
                page = self.numbers[self.indptr[index] + position // PAGE_SIZE]
                for which, array in enumerate(pair):
                    self.pages[page, which, :, position % PAGE_SIZE] = array[position]

    def tensors(self) -> tuple[Array, ...]:
        return self.pages, self.indptr, self.numbers, self.last


def attend(queries: Array, keys: Array, values: Array, is_causal: bool) -> tuple[Array, Array]:
    """The output and its lse, in float64."""
    num_queries, num_keys = len(queries), len(keys)
    scores = np.einsum("qhd,khd->qhk", queries.astype(np.float64), keys) * SCALE
    if is_causal:
        last = num_keys - num_queries + np.arange(num_queries)
        scores[np.broadcast_to(np.arange(num_keys) > last[:, None, None], scores.shape)] = -np.inf
    weights = np.exp(scores)
    sums = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.where(sums > 0, np.log2(sums), NO_SCORE)
    return np.einsum("qhk,khd->qhd", weights, values) / np.maximum(sums, 1e-300)[..., None], lse


def check(
    kernels: Kernels, name: str, expected: Sequence[tuple[Array, Array]], *inputs: Any
) -> None:
    """Ours is as numpy says, and theirs is too."""
    out, lse = (np.concatenate(arrays) for arrays in zip(*expected, strict=True))
    for who in ("theirs", "ours"):
        found_out, found_lse = kernels(who, name, len(out), *inputs)
        np.testing.assert_allclose(found_out, out, atol=2e-5, rtol=0, err_msg=who)
        np.testing.assert_allclose(found_lse, lse, atol=2e-5, rtol=0, err_msg=who)


LENGTHS = (1, 15, 16, 17, 0, 40, 64)


def test_decode(kernels: Kernels) -> None:
    pages = Pages(kernels.heads, LENGTHS)
    queries = random(len(LENGTHS), *kernels.heads)
    expected = [
        attend(queries[i : i + 1], pages.keys[i], pages.values[i], False)
        for i in range(len(LENGTHS))
    ]
    positions = int32(*LENGTHS)
    check(kernels, DECODE, expected, queries, *pages.tensors(), 0 * positions, positions, 0)


@pytest.mark.parametrize("is_causal", [True, False])
def test_prefill_over_pages(kernels: Kernels, is_causal: bool) -> None:
    """A chunk's queries against all before it (not causal), or with its own keys (causal)."""
    num_keys, num_queries = [20, 3, 16, 33], [1, 3, 5, 33]
    if not is_causal:
        num_keys, num_queries = [*num_keys, 0], [*num_queries, 2]
    pages = Pages(kernels.heads, num_keys)
    queries = [random(n, *kernels.heads, seed=n) for n in num_queries]
    expected = [
        attend(q, k, v, is_causal)
        for q, k, v in zip(queries, pages.keys, pages.values, strict=True)
    ]
    positions = np.zeros(sum(num_queries), np.int32)
    check(
        kernels, PAGED, expected, np.concatenate(queries), starts(num_queries),
        *pages.tensors(), int32(*(0 for _ in num_keys)), positions, int(is_causal), 0,
    )  # fmt: skip


@pytest.mark.parametrize("is_causal", [True, False])
def test_prefill_of_what_is_not_in_the_cache_yet(kernels: Kernels, is_causal: bool) -> None:
    lengths = (1, 7, 16, 33)
    queries, keys, values = (
        [random(n, *kernels.heads, seed=100 * which + n) for n in lengths] for which in range(3)
    )
    expected = [attend(*chunk, is_causal) for chunk in zip(queries, keys, values, strict=True)]
    positions = np.zeros(sum(lengths), np.int32)
    packed_q, packed_k, packed_v = (np.concatenate(arrays) for arrays in (queries, keys, values))
    check(
        kernels, RAGGED, expected, packed_q, starts(lengths), packed_k, packed_v,
        starts(lengths), positions, int32(*(0 for _ in lengths)), int(is_causal), 0,
    )  # fmt: skip


def test_it_takes_these_three_and_no_other(kernels: Kernels) -> None:
    assert kernels.taken == set(KERNELS)


def decode(kernels: Kernels, queries: Array, pages: Pages, which: Sequence[int]) -> bytes:
    """The bits of these sequences' outputs."""
    numbers = [pages.numbers[pages.indptr[i] : pages.indptr[i + 1]] for i in which]
    zeros = int32(*(0 for _ in which))
    out, lse = kernels(
        "ours", DECODE, len(which), queries[list(which)], pages.pages,
        starts([len(each) for each in numbers]), np.concatenate(numbers), pages.last[list(which)],
        zeros, zeros, 0,
    )  # fmt: skip
    return b"".join(out[i].tobytes() + lse[i].tobytes() for i in range(len(which)))


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(kernels: Kernels) -> None:
    configure = tvm.get_global_func("runtime.config_threadpool")
    pages = Pages(kernels.heads, LENGTHS)
    queries = random(len(LENGTHS), *kernels.heads)
    everyone = range(len(LENGTHS))
    together = decode(kernels, queries, pages, everyone)
    assert b"".join(decode(kernels, queries, pages, [i]) for i in everyone) == together
    for num_threads in (1, 2, 2):
        configure(1, num_threads)
        assert decode(kernels, queries, pages, everyone) == together


def test_large_scores_do_not_overflow() -> None:
    """exp(300) is no float32."""
    kernels = kernels_of(HEADS[0])
    pages = Pages(kernels.heads, (20,))
    queries = pages.keys[0][7:8] * 1000 / SCALE
    out, lse = kernels("ours", DECODE, 1, queries, *pages.tensors(), int32(0), int32(0), 0)
    assert np.isfinite(lse).all()
    assert np.abs(out).max() <= np.abs(pages.values[0]).max() * 1.001
    scores = np.einsum("hd,khd->hk", queries[0].astype(np.float64), pages.keys[0]) * SCALE
    best = pages.values[0][scores.argmax(-1), np.arange(kernels.heads.number)]
    np.testing.assert_allclose(out[0], best, atol=1e-5)


def test_rotary_embeddings_are_refused() -> None:
    kernels = kernels_of(HEADS[0])
    pages = Pages(kernels.heads, (5,))
    with pytest.raises(Exception, match=r"cpu\.attention has no rotary embedding"):
        kernels(
            "ours", DECODE, 1, random(1, *kernels.heads), *pages.tensors(), int32(0), int32(0), 1
        )


@pytest.mark.parametrize("heads", [Heads(2, 2), Heads(2, 6), Heads(1, 9)], ids=str)
def test_heads_it_cannot_do_are_left_to_tvm(heads: Heads) -> None:
    assert kernels_of(heads).taken == set()


def test_not_on_a_gpu() -> None:
    mod, target = fused_toy("cuda")
    coverage = schedule(mod, [RuleUse(known_rules()["cpu.attention"], {})], target)[1]
    assert {entry.rule for entry in coverage} == {None}
