"""Synthetic weights: pinned bits, a normal distribution, a function of the name alone."""

from __future__ import annotations

import hashlib
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.model.config import SIZES, GPT2Config
from serve.model.parameters import parameter_shapes
from serve.model.synthetic import LEVELS, STANDARD_DEVIATION, SyntheticWeights, normal

pytestmark = pytest.mark.unit

SMALL = GPT2Config(vocab_size=100, n_positions=32, n_embd=16, n_layer=2, n_head=2, n_inner=24)


def digest(array: NDArray[np.float32]) -> str:
    return hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("size", "name", "shape", "expected"),
    [
        (
            "gpt2",
            "transformer.wte.weight",
            (50257, 768),
            "c01f1a8eb8005ad41ee53514beec30e7019b3a7c7843e99b98f0556f4a564f20",
        ),
        (
            "gpt2",
            "transformer.h.0.ln_1.weight",
            (768,),
            "15c7745ac44f49ea59c86db8808e46e09a8c7d4f4bd0e7d73b1009e3677f3f8d",
        ),
        (
            "gpt2",
            "transformer.h.11.mlp.c_proj.weight",
            (768, 3072),
            "f2214278d28aa58a273d3c94cc6f6335a704ee00f7efca0d421c9846825f17cb",
        ),
    ],
)
def test_the_bits_are_these(size: str, name: str, shape: tuple[int, ...], expected: str) -> None:
    array = SyntheticWeights(SIZES[size])[name]
    assert array.shape == shape
    assert array.dtype == np.float32
    assert digest(array) == expected


def test_no_machine_rounds_a_quantile_otherwise() -> None:
    """100 units in the last place of a double, more than any libm errs by, change no float32."""
    inverse = NormalDist(0, STANDARD_DEVIATION).inv_cdf
    table = np.array([inverse((i + 0.5) / LEVELS) for i in range(LEVELS)])
    for error in (100 * 2.0**-52, -100 * 2.0**-52):
        np.testing.assert_array_equal(
            (table * (1 + error)).astype(np.float32), table.astype(np.float32)
        )


def test_normal_with_mean_0_and_deviation_0_02() -> None:
    values = normal("a key", 1_000_000).astype(np.float64)
    assert abs(values.mean()) < 4 * STANDARD_DEVIATION / 1000
    assert abs(values.std() / STANDARD_DEVIATION - 1) < 4 / np.sqrt(2e6)
    for deviations in (1, 2, 3):
        inside = np.mean(np.abs(values) < deviations * STANDARD_DEVIATION)
        expected = 2 * NormalDist().cdf(deviations) - 1
        assert inside == pytest.approx(expected, abs=2e-3)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4e-3


def test_gains_are_around_one_and_all_else_around_zero() -> None:
    config = GPT2Config(vocab_size=500, n_positions=400, n_embd=400, n_layer=1, n_head=4)
    for name, array in SyntheticWeights(config).items():
        is_gain = name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))
        tolerance = 5 * STANDARD_DEVIATION / np.sqrt(array.size)
        assert array.mean(dtype=np.float64) == pytest.approx(float(is_gain), abs=tolerance), name
        assert array.std() == pytest.approx(STANDARD_DEVIATION, rel=5 / np.sqrt(array.size))


def test_every_parameter_in_its_shape() -> None:
    for tied in (True, False):
        config = GPT2Config(**SMALL.as_dict() | {"tie_word_embeddings": tied})
        weights = SyntheticWeights(config)
        assert {name: array.shape for name, array in weights.items()} == parameter_shapes(config)
        assert len(weights) == len(parameter_shapes(config))


def test_the_same_however_often_and_in_whatever_order() -> None:
    weights = SyntheticWeights(SMALL)
    first = {name: array.copy() for name, array in weights.items()}
    for name in reversed(list(weights)):
        weights[name][...] = 7  # the caller's own: a later access must not see it
    for name, array in first.items():
        np.testing.assert_array_equal(weights[name], array)
        np.testing.assert_array_equal(SyntheticWeights(SMALL)[name], array)


def test_no_two_tensors_are_alike() -> None:
    digests = [digest(array) for array in SyntheticWeights(SMALL).values()]
    assert len(set(digests)) == len(digests)


def test_another_seed_is_another_model() -> None:
    name = "transformer.wte.weight"
    assert digest(SyntheticWeights(SMALL, 1)[name]) != digest(SyntheticWeights(SMALL)[name])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1000])
def test_a_shorter_draw_is_the_beginning_of_a_longer(count: int) -> None:
    np.testing.assert_array_equal(normal("k", count), normal("k", 2000)[:count])


def test_not_a_parameter() -> None:
    with pytest.raises(KeyError):
        SyntheticWeights(SMALL)["lm_head.weight"]
