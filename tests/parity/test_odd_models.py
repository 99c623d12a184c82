"""Models of odd widths, other rungs and another processor: transformers' logits, the same bits.

As in test_invariance.py, of which this is the breadth: what a sequence's logits are does not depend
on how it is computed.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from profiles import load_profile
from serve.backends import get_backend
from serve.compiler.cache import LibraryCache
from serve.compiler.compile import CompileJob, get_library
from serve.engine import Chunk
from serve.errors import LibraryError
from serve.runtime.runner import TVMRunner
from serve.runtime.weights import DeviceWeights
from tests.parity.conftest import Judged, MakeModel, MakeRunner, assert_close

pytestmark = pytest.mark.parity

LENGTH = 200  # of the sequence: more than two tasks of 96 rows
MAX_BATCH = 33
NARROW: dict[str, Any] = {
    "n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": LENGTH, "vocab_size": 501,
    "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # by the width of a head
    "16": NARROW,
    "64": NARROW | {"n_embd": 192, "n_head": 3, "n_layer": 1, "vocab_size": 1001},
    "80": NARROW | {"n_embd": 160, "n_head": 2, "n_layer": 1, "activation_function": "gelu"},
    "128": NARROW
    | {"n_embd": 1280, "n_head": 10, "n_layer": 1, "n_inner": 100, "vocab_size": 97}
    | {"initializer_range": 0.07},
}
TINY = NARROW | {"n_embd": 16, "n_head": 1, "n_layer": 1, "vocab_size": 16}
OTHER_RUNGS = ("matmul", "gemv", "reduction")


class Subject(NamedTuple):
    """A sequence, its logits by transformers, and ours after every token, all at once."""

    runner: TVMRunner
    ids: list[int]
    theirs: NDArray[np.float32]
    expected: NDArray[np.float32]


def subject_of(runner: TVMRunner, model: Judged) -> Subject:
    vocab_size = model.source.config.vocab_size
    ids = [int(i) for i in np.random.default_rng(3).integers(0, vocab_size, LENGTH)]
    runner.add(0)
    expected = runner.verify([Chunk(0, ids)])
    runner.release(0)
    return Subject(runner, ids, model.logits(ids), expected)


@pytest.fixture(scope="module")
def find(make_model: MakeModel, make_runner: MakeRunner) -> Callable[[str], Subject]:
    limits = {"max_batch": MAX_BATCH, "max_step_tokens": LENGTH, "kv_tokens": MAX_BATCH * 112}

    @cache
    def model(name: str) -> Judged:
        return make_model(**MODELS[name])

    @cache
    def of(name: str) -> Subject:
        """A head's width, a rung, or a processor."""
        if name in MODELS:
            return subject_of(make_runner(model(name).source, **limits), model(name))
        if name in OTHER_RUNGS:
            return subject_of(make_runner(model("16").source, name, **limits), model("16"))
        return subject_of(make_runner(model("16").source, mcpu=name, **limits), model("16"))

    return of


@pytest.fixture(params=[*MODELS, "haswell"])
def subject(request: pytest.FixtureRequest, find: Callable[[str], Subject]) -> Subject:
    if request.param == "haswell":
        if platform.machine() != "x86_64":
            pytest.skip("haswell is an x86-64")
        backend = get_backend("cpu", "haswell")
        missing = backend.missing_features(backend.target())
        if missing:
            pytest.skip(f"this machine lacks features of haswell: {', '.join(missing)}")
    return find(request.param)


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def test_against_transformers(subject: Subject) -> None:
    assert_close(subject.expected, subject.theirs)


@pytest.mark.parametrize("rung", OTHER_RUNGS)
def test_other_rungs_against_transformers(rung: str, find: Callable[[str], Subject]) -> None:
    """Prefill at once and in chunks, decode alone and in a batch."""
    runner, ids, theirs, expected = find(rung)
    assert_close(expected, theirs)
    runner.add(0)
    assert_close(runner.prefill([Chunk(0, ids[:97])])[0], theirs[96])
    assert_close(runner.verify([Chunk(0, ids[97:150])]), theirs[97:150])
    assert_close(runner.decode([0], [ids[150]])[0], theirs[150])
    runner.fork(0, 1, 40)
    assert_close(runner.decode([0, 1], [ids[151], ids[40]]), theirs[[151, 40]])
    for seq_id in (0, 1):
        runner.release(seq_id)


def test_prefill_of_every_length(subject: Subject) -> None:
    """Up to 70, and around the edges of a task of 96 rows."""
    runner, ids, _, expected = subject
    for length in (*range(1, 71), 95, 96, 97, 191, 192, 193):
        runner.add(0)
        found = runner.verify([Chunk(0, ids[:length])])
        runner.release(0)
        assert_same_bits(found, expected[:length])


def test_token_by_token(subject: Subject) -> None:
    runner, ids, _, expected = subject
    runner.add(0)
    found = [runner.decode([0], [token])[0] for token in ids[:100]]
    runner.release(0)
    assert_same_bits(np.stack(found), expected[:100])


def test_batches_of_every_size(subject: Subject) -> None:
    """Decode, and prefill of a few tokens each, of 1 to 33 sequences of all lengths."""
    runner, ids, _, expected = subject
    lengths = [(5 * i) % 31 for i in range(MAX_BATCH)]
    for seq_id, length in enumerate(lengths):
        runner.add(seq_id)
        runner.prefill([Chunk(seq_id, ids[: length + 1])])
    done = [length + 1 for length in lengths]
    for size in range(1, MAX_BATCH + 1):
        seq_ids = list(range(size))
        if size % 8 == 0:
            chunks = [Chunk(i, ids[done[i] : done[i] + i % 4 + 1]) for i in seq_ids]
            found = runner.prefill(chunks)
            for i, chunk in enumerate(chunks):
                done[i] += len(chunk.token_ids)
        else:
            found = runner.decode(seq_ids, [ids[done[i]] for i in seq_ids])
            for i in seq_ids:
                done[i] += 1
        assert_same_bits(found, expected[[done[i] - 1 for i in seq_ids]])
    for seq_id in range(MAX_BATCH):
        runner.release(seq_id)


@pytest.mark.parametrize("seed", range(3))
def test_random_chunks_and_forks(subject: Subject, seed: int) -> None:
    """A sequence in chunks of random sizes; a child of it, forked on the way, in others."""
    runner, ids, _, expected = subject
    chance = np.random.default_rng(seed)
    runner.add(0)
    done = {0: 0}
    while min(done.values()) < LENGTH:
        if len(done) == 1 and done[0] > 50:
            done[1] = int(chance.integers(1, done[0]))
            runner.fork(0, 1, done[1])
        chunks = []
        for seq_id in [int(i) for i in chance.permutation(list(done))]:
            size = int(chance.integers(1, 60)) if chance.integers(2) else 1
            chunk = ids[done[seq_id] : done[seq_id] + size]
            if chunk:
                chunks.append(Chunk(seq_id, chunk))
                done[seq_id] += len(chunk)
        found = runner.prefill(chunks)
        assert_same_bits(found, expected[[done[chunk.seq_id] - 1 for chunk in chunks]])
    for seq_id in done:
        runner.release(seq_id)
    assert runner.num_free_pages() == runner.limits.num_pages


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 processors")
def test_a_library_for_another_processor_is_refused(
    make_model: MakeModel, library_cache: LibraryCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end this process with an illegal instruction."""
    model, backend = make_model(**TINY), get_backend("cpu", "sapphirerapids")
    job = CompileJob(model.source.config, backend, load_profile("full"))
    library = get_library(job, library_cache).library
    assert library.manifest.target["mcpu"] == "sapphirerapids"
    weights = DeviceWeights(model.source.load(), backend.device())
    if not backend.missing_features(backend.target()):
        absent = {"amx-tile", "amx-int8"}
        monkeypatch.setattr("serve.backends.cpu._absent_features", lambda: absent)
    with pytest.raises(LibraryError) as caught:
        TVMRunner(library, weights, backend)
    told = str(caught.value)
    assert told.startswith(f"{library.path}: built for sapphirerapids, with instructions that")
    assert "amx-tile" in told
    assert "library.mcpu" in told
