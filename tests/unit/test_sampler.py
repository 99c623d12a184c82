"""The sampler against a plain one in float64: which tokens it keeps, and how likely each is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serve.engine import SamplingParams
from serve.engine.sampler import choose
from serve.engine.sequence import Sequence

pytestmark = pytest.mark.unit

Row = NDArray[np.float32]
Doubles = NDArray[np.float64]

GPT2_VOCAB = 50257
ALMOST_ONE = math.nextafter(1, 0)


class Uniforms:
    """In place of a sequence's generator: gives out these numbers, and counts."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = numbers
        self.num_drawn = 0

    def random(self) -> float:
        self.num_drawn += 1
        return self._numbers[(self.num_drawn - 1) % len(self._numbers)]


def make(params: SamplingParams, prompt: Seq[int] = (0,), generated: Seq[int] = ()) -> Sequence:
    sequence = Sequence(0, tuple(prompt), params)
    for token_id in generated:
        sequence.append(token_id)
    return sequence


def draw(row: Row, sequence: Sequence, uniform: float) -> int | None:
    """The token that is sampled when the generator says `uniform`."""
    sequence.rng = cast(np.random.Generator, Uniforms(uniform))
    return choose(row, sequence)


def one(row: Seq[float] | Row, uniform: float = 0.5, **params: Any) -> int | None:
    return draw(np.array(row, np.float32), make(SamplingParams(**params)), uniform)


# -- the plain sampler


def adjusted(row: Row, sequence: Sequence) -> Doubles:
    params, out = sequence.params, row.astype(np.float64)
    for token_id in set(sequence.token_ids):
        penalty = params.repetition_penalty
        out[token_id] = out[token_id] / penalty if out[token_id] > 0 else out[token_id] * penalty
    for token_id, times in Counter(sequence.token_ids[len(sequence.prompt_ids) :]).items():
        out[token_id] -= params.presence_penalty + params.frequency_penalty * times
    for token_id, bias in params.logit_bias.items():
        out[token_id] += bias
    if sequence.num_generated < params.min_tokens:
        for token_id in params.stop_token_ids:
            if 0 <= token_id < len(out):
                out[token_id] = -np.inf
    return out


def probabilities(row: Doubles, params: SamplingParams) -> Doubles:
    weights: Doubles = np.exp((row - row.max()) / params.temperature)
    if 0 < params.top_k < len(row):
        weights[row < sorted(row)[-params.top_k]] = 0
    if params.min_p:
        weights[weights < params.min_p * weights.max()] = 0
    if params.top_p < 1:
        weights[weights < nucleus_threshold(weights, params.top_p)] = 0
    return cast(Doubles, weights / weights.sum())


def nucleus_threshold(weights: Doubles, top_p: float) -> float:
    mass, total = 0.0, weights.sum()
    for weight in sorted(weights, reverse=True):
        mass += weight
        if mass >= top_p * total:
            return float(weight)
    return 0.0


def is_clear(row: Doubles, params: SamplingParams) -> bool:
    """Whether no rounding of float32 can change which tokens are kept."""
    kept = probabilities(row, params) > 0
    nudged = [
        replace(params, top_p=params.top_p * factor, min_p=min(1.0, params.min_p * factor))
        for factor in (1 - 1e-4, 1 + 1e-4)
    ]
    return all(np.array_equal(probabilities(row, near) > 0, kept) for near in nudged)


def check(row: Row, sequence: Sequence) -> None:
    """Every token kept owns its share of the numbers from 0 to 1, and nobody else has any."""
    expected = probabilities(adjusted(row, sequence), sequence.params)
    ends = np.cumsum(expected)
    margin = 1e-5  # float32 may move a border by a little less
    kept = np.flatnonzero(expected)
    for token_id in kept[expected[kept] > margin]:
        begin, end = ends[token_id] - expected[token_id], ends[token_id]
        assert draw(row, sequence, (begin + end) / 2) == token_id
        if end - begin > 3 * margin:
            assert draw(row, sequence, begin + margin) == token_id
            assert draw(row, sequence, end - margin) == token_id
    for extreme in (0.0, ALMOST_ONE):
        assert draw(row, sequence, extreme) in kept


# -- distributions

ALONE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.25},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.75},
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 0.5},
    {"logit_bias": {3: 2.0, 11: -100.0, 12: 5.5}},
    {"min_tokens": 5, "stop_token_ids": frozenset({2, 9})},
]
TOGETHER: dict[str, Any] = {
    "temperature": 0.75,
    "top_k": 20,
    "top_p": 0.875,
    "min_p": 0.0078125,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "repetition_penalty": 2.0,
    "logit_bias": {3: 2.0, 11: -100.0, 12: 5.5},
    "min_tokens": 5,
    "stop_token_ids": frozenset({2, 9}),
}
PROMPT, GENERATED = (4, 4, 5, 6), (5, 7, 7, 3)


def ident(params: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in params.items()) or "plain"


def logits(seed: int, size: int, spread: float = 2.0) -> Row:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


@pytest.mark.parametrize("params", [*ALONE, TOGETHER], ids=ident)
def test_every_token_has_its_share(params: dict[str, Any]) -> None:
    for seed in range(5):
        sequence = make(SamplingParams(**params), PROMPT, GENERATED)
        check(logits(seed, 40), sequence)


@pytest.mark.parametrize("params", [*ALONE, TOGETHER], ids=ident)
def test_frequencies(params: dict[str, Any]) -> None:
    num_draws, row = 3000, logits(1, 24)
    sequence = make(SamplingParams(seed=7, **params), PROMPT, GENERATED)
    expected = probabilities(adjusted(row, sequence), sequence.params)
    seen = Counter(choose(row, sequence) for _ in range(num_draws))
    assert {int(i) for i in np.flatnonzero(expected)} >= seen.keys()
    kept = expected > 0
    counts = np.array([seen[i] for i in range(len(row))])[kept]
    mean = num_draws * expected[kept]
    freedom = int(kept.sum()) - 1
    statistic = float(((counts - mean) ** 2 / mean).sum())
    assert statistic <= freedom + 5 * math.sqrt(2 * freedom)  # 5 standard deviations


# Multiples of a quarter, so that ties are frequent, and float32 computes penalties exactly.
QUARTERS = st.integers(-24, 24).map(lambda n: n / 4)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.3, 2.0]),
    top_k=st.integers(0, 30),
    top_p=st.floats(0.001, 1.0),
    min_p=st.sampled_from([0.0, 0.0]) | st.floats(0.0, 1.0),
    presence_penalty=st.integers(-8, 8).map(lambda n: n / 4),
    frequency_penalty=st.integers(-8, 8).map(lambda n: n / 4),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
    logit_bias=st.dictionaries(
        st.integers(0, 9), st.integers(-100, 100).map(float) | QUARTERS, max_size=5
    ),
    stop_token_ids=st.frozensets(st.integers(-3, 30), max_size=4),
    min_tokens=st.integers(0, 6),
)
IDS = st.lists(st.integers(0, 9), max_size=8)


@settings(deadline=None)
@given(st.lists(QUARTERS, min_size=10, max_size=25), PARAMS, IDS, IDS)
def test_all_parameters_together(
    values: list[float], params: SamplingParams, prompt: list[int], generated: list[int]
) -> None:
    row = np.array(values, np.float32)
    sequence = make(params, prompt, generated)
    expected = adjusted(row, sequence)
    assume(expected.max() > -np.inf)
    assume(is_clear(expected, params))
    check(row, sequence)
    sequence.params = replace(params, temperature=0)
    assert draw(row, sequence, 0.9) == np.argmax(expected)


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 900, "top_p": 0.99}],
    ids=ident,
)
def test_the_whole_vocabulary(params: dict[str, Any]) -> None:
    """Where the sums run over many blocks, and most blocks may be empty."""
    row = logits(3, GPT2_VOCAB)
    sequence = make(SamplingParams(**params))
    expected = probabilities(adjusted(row, sequence), sequence.params)
    ends = np.cumsum(expected)
    kept = np.flatnonzero(expected)
    likely = kept[expected[kept] > 1e-6]  # wide against the rounding of sums
    for token_id in likely[:: max(1, len(likely) // 100)]:
        assert draw(row, sequence, ends[token_id] - expected[token_id] / 2) == token_id
    for uniform in np.random.default_rng(4).random(200):
        assert draw(row, sequence, uniform) in kept
    assert draw(row, sequence, 0.0) == kept[0]
    assert draw(row, sequence, ALMOST_ONE) == kept[-1]


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 511, 512, 513, 1000])
def test_around_whole_blocks(size: int) -> None:
    row = np.zeros(size, np.float32)
    for token_id in range(size):
        assert one(row, (token_id + 0.5) / size) == token_id
    row = np.full(size, -np.inf, np.float32)
    row[-1] = 0
    assert [one(row, uniform) for uniform in (0.0, 0.5, ALMOST_ONE)] == [size - 1] * 3


@settings(deadline=None)
@given(
    st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=600),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1),
)
def test_a_token_of_no_weight_is_never_sampled(
    values: list[float], uniform: float, top_p: float
) -> None:
    row = np.array(values, np.float32)
    token_id = one(row, uniform, top_p=top_p)
    assert token_id is not None
    assert row[token_id] >= row.max() - 104  # below that, exp() is 0 in float32
    if top_p == 0:
        assert row[token_id] >= row.max() - 1e-6  # as good as the best one


# -- extremes

LINE = [1.0, 3.0, 2.0, 3.0 - 1e-3]


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-45, 1e-38, 1e-5])
@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_hardly_any_temperature_is_greedy(temperature: float, uniform: float) -> None:
    assert one(LINE, uniform, temperature=temperature) == 1
    assert one([-3e38, 3e38, -np.inf, 0.0], uniform, temperature=temperature) == 1


def test_greedy_takes_the_first_of_equals_and_sampling_any() -> None:
    assert one([1.0, 2.0, 2.0], 0.9, temperature=0) == 1
    assert one([1.0, 2.0, 2.0], 0.9, temperature=1e-30) == 2


def test_greedy_is_after_penalties_and_bias() -> None:
    row = np.array([1.0, 2.0, 3.0], np.float32)
    greedy = SamplingParams(temperature=0)
    for params, expected in [
        (replace(greedy, presence_penalty=2), 1),
        (replace(greedy, frequency_penalty=1.5, logit_bias={0: 1.75}), 0),
        (replace(greedy, repetition_penalty=2), 1),
        (replace(greedy, logit_bias={2: -100}), 1),
        (replace(greedy, logit_bias={0: 100}), 0),
        (replace(greedy, min_tokens=3, stop_token_ids=frozenset({2})), 1),
        (replace(greedy, min_tokens=1, stop_token_ids=frozenset({2})), 2),
    ]:
        assert draw(row, make(params, generated=[2]), 0.5) == expected


def test_penalties_count_what_they_say() -> None:
    row = np.zeros(4, np.float32)
    row[0] = 1.0
    greedy = SamplingParams(temperature=0)
    for params in (replace(greedy, presence_penalty=2), replace(greedy, frequency_penalty=2)):
        assert draw(row, make(params, prompt=[0]), 0.5) == 0  # the prompt does not count
    assert draw(-row, make(replace(greedy, repetition_penalty=2), prompt=[1, 2, 3]), 0.5) == 1
    assert draw(row, make(replace(greedy, repetition_penalty=2), prompt=[0, 0]), 0.5) == 0
    assert draw(row - 2, make(replace(greedy, repetition_penalty=4), prompt=[0]), 0.5) == 1


@pytest.mark.parametrize("top_k", [4, 5, 10**9])
def test_top_k_of_all_is_off(top_k: int) -> None:
    row = np.array(LINE, np.float32)
    for uniform in np.linspace(0, 0.999, 50):
        assert one(row, uniform, top_k=top_k) == one(row, uniform)


@pytest.mark.parametrize(
    "params", [{"top_p": 1e-12}, {"top_p": 0.0}, {"min_p": 1.0}, {"min_p": 1.5}], ids=ident
)
def test_the_best_is_always_kept(params: dict[str, Any]) -> None:
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert one(LINE, uniform, **params) == 1


@pytest.mark.parametrize(
    "params", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}, {"top_p": 1e-9}], ids=ident
)
def test_what_ties_with_the_last_one_kept_is_kept(params: dict[str, Any]) -> None:
    row = [5.0, -5.0, 5.0, 5.0, -5.0]
    assert {one(row, uniform, **params) for uniform in (0.1, 0.5, 0.9)} == {0, 2, 3}


@pytest.mark.parametrize("params", [*ALONE, TOGETHER, {"temperature": 0.0}], ids=ident)
def test_all_but_one_ruled_out(params: dict[str, Any]) -> None:
    row = np.full(40, -np.inf, np.float32)
    row[17] = -2.5
    for uniform in (0.0, 0.5, ALMOST_ONE):
        sequence = make(SamplingParams(**params), PROMPT, GENERATED)
        assert draw(row, sequence, uniform) == 17


@pytest.mark.parametrize("params", [*ALONE, TOGETHER, {"temperature": 0.0}], ids=ident)
def test_no_token_from_a_broken_row(params: dict[str, Any]) -> None:
    rows = np.zeros((3, 40), np.float32)
    rows[0, 39] = np.nan
    rows[1] = -np.inf
    sequences = [make(SamplingParams(seed=1, **params), PROMPT, GENERATED) for _ in rows]
    first, second, third = map(choose, rows, sequences)
    assert (first, second) == (None, None)
    assert third is not None  # one bad row fails one sequence


def test_a_row_with_every_token_ruled_out_by_the_parameters() -> None:
    barred: dict[str, Any] = {"min_tokens": 1, "stop_token_ids": frozenset({0, 1})}
    for temperature in (0.0, 1.0):
        assert one([0.0, 1.0], temperature=temperature, **barred) is None


def test_bias_of_a_hundred_decides() -> None:
    row = logits(5, 1000, spread=5.0)
    for uniform in (1e-15, 0.5, ALMOST_ONE):
        assert one(row, uniform, logit_bias={321: 100}) == 321
    best = int(row.argmax())
    ids = {one(row, u, logit_bias={best: -100}) for u in np.linspace(0, 0.9999, 200)}
    assert best not in ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_are_barred_until_min_tokens(temperature: float) -> None:
    row = np.array([0.0, 0.0, 60.0, 50.0], np.float32)
    params = SamplingParams(
        temperature=temperature, min_tokens=2, stop_token_ids=frozenset({2, 4, 50256, -1})
    )
    chosen = [draw(row, make(params, generated=[0] * n), 0.5) for n in range(4)]
    assert chosen == [3, 3, 2, 2]


def test_the_rows_given_stay_as_they_are() -> None:
    rows = np.stack([logits(n, 40) for n in range(2)])
    before = rows.copy()
    params = (SamplingParams(**TOGETHER), SamplingParams(**{**TOGETHER, "temperature": 0.0}))
    for row, p in zip(rows, params, strict=True):
        choose(row, make(p, PROMPT, GENERATED))
    np.testing.assert_array_equal(rows, before)


# -- seeds


def mixed(size: int) -> list[SamplingParams]:
    """Seeded parameters of every kind."""
    kinds = [*ALONE, TOGETHER, {"temperature": 0.0}]
    return [SamplingParams(seed=n, **kinds[n % len(kinds)]) for n in range(size)]


def test_neither_order_nor_company_changes_a_choice() -> None:
    rows = np.stack([logits(n, 3000) for n in range(34)])
    params = mixed(len(rows))

    def run(batches: list[list[int]]) -> dict[int, list[int | None]]:
        sequences = [make(p, PROMPT, GENERATED) for p in params]
        tokens: dict[int, list[int | None]] = {n: [] for n in range(len(rows))}
        for batch in batches:
            for n in batch:
                tokens[n].append(choose(rows[n], sequences[n]))
        return tokens

    everybody = list(range(len(rows)))
    alone = run([[n] for n in everybody] * 3)
    assert run([everybody] * 3) == alone
    shuffled = [everybody[::-1], everybody[1::2], everybody[::2], everybody[10:], everybody[:10]]
    assert run(shuffled) == alone


@pytest.mark.parametrize("params", [*ALONE, TOGETHER], ids=ident)
def test_one_number_is_drawn_for_a_token(params: dict[str, Any]) -> None:
    sequence = make(SamplingParams(seed=3, **params), PROMPT, GENERATED)
    twin = make(SamplingParams(seed=3, **params), PROMPT, GENERATED)
    for _ in range(5):
        assert choose(logits(2, 40), sequence) is not None
        twin.rng.random()
        assert sequence.rng.bit_generator.state == twin.rng.bit_generator.state


def test_greedy_draws_nothing() -> None:
    uniforms = Uniforms(0.5)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0, top_k=3)):
        sequence = make(params)
        sequence.rng = cast(np.random.Generator, uniforms)
        choose(logits(2, 40), sequence)
    assert uniforms.num_drawn == 0


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_a_seed_gives_the_same_tokens(seed: int) -> None:
    row = np.zeros(1000, np.float32)
    first, second = (make(SamplingParams(seed=seed)) for _ in range(2))
    assert [choose(row, first) for _ in range(9)] == [choose(row, second) for _ in range(9)]


def test_without_a_seed_every_sequence_has_its_own() -> None:
    row = np.zeros(50257, np.float32)
    chosen = {choose(row, make(SamplingParams())) for _ in range(20)}
    assert len(chosen) > 10
