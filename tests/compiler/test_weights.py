"""Weights on a device: read and packed once, shared by the libraries of one layout, and checked."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from serve.errors import WeightsError
from serve.runtime.weights import DeviceWeights
from tests.compiler.kernels import packed

pytestmark = pytest.mark.compiler

Array = NDArray[np.float32]
WEIGHT = np.arange(21 * 4, dtype=np.float32).reshape(21, 4)
BIAS = np.ones(21, np.float32)


class Source(Mapping[str, Array]):
    """Says how often each of its tensors was read."""

    def __init__(self) -> None:
        self.tensors = {"weight": WEIGHT, "bias": BIAS}
        self.reads: list[str] = []

    def __getitem__(self, name: str) -> Array:
        array = self.tensors[name]
        self.reads.append(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Packer:
    """A library's `pack`, which counts its calls."""

    def __init__(self, panel: int) -> None:
        self.panel, self.calls = panel, 0

    def __call__(self, tensor: Any) -> Any:
        self.calls += 1
        return tvm.runtime.tensor(packed(tensor.numpy(), self.panel))


def is_same(one: Any, other: Any) -> bool:
    """Whether two tensors are one memory."""
    return np.shares_memory(np.from_dlpack(one), np.from_dlpack(other))


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def weights(source: Source) -> DeviceWeights:
    return DeviceWeights(source, tvm.cpu())


def test_they_are_read_as_they_are_asked_for(source: Source, weights: DeviceWeights) -> None:
    assert source.reads == []
    tensor = weights.get("weight", (21, 4))
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)
    assert is_same(weights.get("weight", [21, 4]), tensor)
    assert source.reads == ["weight"]
    np.testing.assert_array_equal(weights.get("bias", (21,)).numpy(), BIAS)


def test_each_layout_is_packed_once(source: Source, weights: DeviceWeights) -> None:
    eight, sixteen, another = Packer(8), Packer(16), Packer(16)
    found = {pack: weights.get("weight", (21, 4), pack.panel, pack) for pack in (eight, sixteen)}
    for pack, tensor in found.items():
        np.testing.assert_array_equal(tensor.numpy(), packed(WEIGHT, pack.panel))
        assert is_same(weights.get("weight", (21, 4), pack.panel, pack), tensor)
    # The library of another profile, or the same one in another runner.
    assert is_same(weights.get("weight", (21, 4), 16, another), found[sixteen])
    assert [pack.calls for pack in (eight, sixteen, another)] == [1, 1, 0]
    np.testing.assert_array_equal(weights.get("weight", (21, 4)).numpy(), WEIGHT)
    assert source.reads == ["weight"] * 3  # packed twice, and as it is


@pytest.mark.parametrize(
    ("name", "shape", "expected", "found"),
    [
        ("weights", (21, 4), "[21, 4]", "nothing"),
        ("weight", (4, 21), "[4, 21]", "shape [21, 4]"),
        ("weight", (21, 5), "[21, 5]", "shape [21, 4]"),
        ("weight", (21,), "[21]", "shape [21, 4]"),
        ("bias", (21, 1), "[21, 1]", "shape [21]"),
    ],
)
@pytest.mark.parametrize("pack", [None, Packer(8)])
def test_not_the_ones_that_a_library_was_compiled_for(
    weights: DeviceWeights,
    name: str,
    shape: tuple[int, ...],
    expected: str,
    found: str,
    pack: Packer | None,
) -> None:
    panel = None if pack is None else pack.panel
    weights.get("weight", (21, 4), panel, pack)  # it is no other for having been asked for before
    calls = 0 if pack is None else pack.calls
    with pytest.raises(WeightsError) as caught:
        weights.get(name, shape, panel, pack)
    for words in (name, expected, found, "the loaded weights"):
        assert words in str(caught.value)
    assert pack is None or pack.calls == calls


def test_what_no_runner_has_is_freed_and_read_again(source: Source, weights: DeviceWeights) -> None:
    tensor = weights.get("weight", (21, 4))
    del tensor
    gc.collect()
    np.testing.assert_array_equal(weights.get("weight", (21, 4)).numpy(), WEIGHT)
    assert source.reads == ["weight", "weight"]
