"""Log-probabilities against plain ones, and the requests that ask for them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.logprobs import log_probabilities

pytestmark = pytest.mark.unit

LOGITS = st.lists(st.floats(-90, 90, width=32) | st.just(-math.inf), min_size=1, max_size=40)


def plain(values: list[float]) -> list[float]:
    best = max(values)
    total = math.log(math.fsum(math.exp(value - best) for value in values))
    return [value - best - total for value in values]


@given(LOGITS.filter(lambda values: max(values) > -math.inf), st.integers(0, 45), st.data())
def test_against_a_plain_softmax(values: list[float], num_top: int, data: st.DataObject) -> None:
    token_id = data.draw(st.integers(0, len(values) - 1))
    found = log_probabilities(np.array(values, np.float32), token_id, num_top)
    expected = plain(values)
    assert found.logprob == pytest.approx(expected[token_id], abs=1e-12)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert [i for i, _ in found.top] == order[:num_top]
    assert [p for _, p in found.top] == pytest.approx([expected[i] for i in order[:num_top]])


def test_it_is_as_exact_as_float64() -> None:
    """Float32 would be off by 10⁻⁷ here, and by a hundred times that in a sum of its own."""
    row = np.random.default_rng(1).normal(0, 3, 50257).astype(np.float32)
    expected = plain([float(value) for value in row])
    for token_id in (0, 7, int(row.argmax()), int(row.argmin())):
        found = log_probabilities(row, token_id, 0)
        assert found.logprob == pytest.approx(expected[token_id], abs=1e-12, rel=0)
        assert found.top == ()


def test_of_equals_the_lower_id_comes_first() -> None:
    row = np.array([1, 5, 5, 0, 5, 1], np.float32)
    found = log_probabilities(row, 3, 4)
    assert [i for i, _ in found.top] == [1, 2, 4, 0]


def test_the_row_stays_as_it_is() -> None:
    row = np.arange(5, dtype=np.float32)
    log_probabilities(row, 2, 3)
    np.testing.assert_array_equal(row, np.arange(5))


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_no_distribution(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="no distribution"):
        log_probabilities(np.array(bad, np.float32), 1, 1)
