"""Our logits against transformers' on the same weights, in f32.

Every way into and through the KV cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from serve.engine import Chunk, Engine, EngineConfig, SamplingParams, TokenEvent
from serve.runtime.runner import TVMRunner
from tests.parity.conftest import PROFILES, Judged, MakeModel, MakeRunner, assert_close

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _no_page_is_lost(runner: TVMRunner) -> Iterator[None]:
    yield
    assert runner.num_free_pages() == runner.limits.num_pages


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 70, 322, 384])
def test_prefill(runner: TVMRunner, toy: Judged, prompt: list[int], length: int) -> None:
    runner.add(0)
    ours = runner.prefill([Chunk(0, prompt[:length])])
    runner.release(0)
    assert_close(ours[0], toy.logits(prompt[:length])[-1])


@pytest.mark.parametrize("size", [1, 7, 16, 17, 300])
def test_prefill_in_chunks(runner: TVMRunner, toy: Judged, prompt: list[int], size: int) -> None:
    theirs = toy.logits(prompt)
    runner.add(0)
    for begin in range(0, len(prompt), size):
        chunk = prompt[begin : begin + size]
        ours = runner.prefill([Chunk(0, chunk)])
        assert_close(ours[0], theirs[begin + len(chunk) - 1])
    runner.release(0)


def test_several_prompts_packed(runner: TVMRunner, toy: Judged, prompt: list[int]) -> None:
    lengths = [1, 16, 33, 5, 100]
    for seq_id in range(len(lengths)):
        runner.add(seq_id)
    chunks = [Chunk(i, prompt[i : i + n]) for i, n in enumerate(lengths)]
    for ours, chunk in zip(runner.prefill(chunks), chunks, strict=True):
        assert_close(ours, toy.logits(list(chunk.token_ids))[-1])
    more = [Chunk(i, prompt[i + n : i + n + 3]) for i, n in enumerate(lengths)]  # on top of those
    for i, ours in enumerate(runner.prefill(more)):
        assert_close(ours, toy.logits(prompt[i : i + lengths[i] + 3])[-1])
        runner.release(i)


def test_greedy_decode(runner: TVMRunner, toy: Judged, prompt: list[int]) -> None:
    head = prompt[:50]
    tokens = toy.greedy(head, 64)
    theirs = toy.logits(head + tokens)
    runner.add(0)
    ours = runner.prefill([Chunk(0, head)])
    for step, token in enumerate(tokens):
        assert_close(ours[0], theirs[len(head) + step - 1])
        assert int(ours[0].argmax()) == token
        ours = runner.decode([0], [token])
    runner.release(0)


def test_batched_decode_of_mixed_lengths(runner: TVMRunner, toy: Judged, prompt: list[int]) -> None:
    lengths = [1, 15, 16, 17, 31, 100, 200]
    for seq_id, length in enumerate(lengths):
        runner.add(seq_id)
        runner.prefill([Chunk(seq_id, prompt[:length])])
    theirs = toy.logits(prompt)
    seq_ids = list(range(len(lengths)))
    for step in range(20):
        at = [length + step for length in lengths]
        assert_close(runner.decode(seq_ids, [prompt[i] for i in at]), theirs[at])
    for seq_id in seq_ids:
        runner.release(seq_id)


@pytest.mark.parametrize("position", [1, 15, 16, 17, 32, 40, 64])
def test_fork(runner: TVMRunner, toy: Judged, prompt: list[int], position: int) -> None:
    """At and inside a page boundary; both go their own ways from there."""
    runner.add(0)
    runner.prefill([Chunk(0, prompt[:64])])
    runner.fork(0, 1, position)
    other = prompt[200:220]
    ours = runner.prefill([Chunk(0, prompt[64:70]), Chunk(1, other)])
    assert_close(ours[0], toy.logits(prompt[:70])[-1])
    assert_close(ours[1], toy.logits(prompt[:position] + other)[-1])
    runner.release(0)  # the child outlives its parent
    ours = runner.decode([1], [prompt[0]])
    assert_close(ours[0], toy.logits([*prompt[:position], *other, prompt[0]])[-1])
    runner.release(1)


def test_forks_of_forks(runner: TVMRunner, toy: Judged, prompt: list[int]) -> None:
    runner.add(0)
    runner.prefill([Chunk(0, prompt[:20])])
    for depth in range(1, 6):
        runner.fork(depth - 1, depth, 20 * depth)
        runner.prefill([Chunk(depth, prompt[20 * depth : 20 * depth + 20])])
    for depth in range(5):
        runner.release(depth)
    theirs = toy.logits(prompt[:130])
    for position in range(120, 130):
        assert_close(runner.decode([5], [prompt[position]])[0], theirs[position])
    runner.release(5)


def test_verify_and_rollback(runner: TVMRunner, toy: Judged, prompt: list[int]) -> None:
    theirs = toy.logits(prompt[:60])
    for seq_id in (0, 1):
        runner.add(seq_id)
        runner.prefill([Chunk(seq_id, prompt[:30])])
    ours = runner.verify([Chunk(0, prompt[30:50]), Chunk(1, prompt[30:33])])
    assert_close(ours, np.concatenate([theirs[30:50], theirs[30:33]]))
    runner.rollback(0, 11)
    assert_close(runner.decode([0], [prompt[39]])[0], theirs[39])
    for seq_id in (0, 1):
        runner.release(seq_id)


def test_the_last_position(runner: TVMRunner, toy: Judged, prompt: list[int]) -> None:
    theirs = toy.logits(prompt)
    runner.add(0)
    runner.prefill([Chunk(0, prompt[:380])])
    for position in range(380, 384):
        assert_close(runner.decode([0], [prompt[position]])[0], theirs[position])
    runner.release(0)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile(
    profile: str, toy: Judged, make_runner: MakeRunner, prompt: list[int]
) -> None:
    """Prefill, one decode, batched decode: the same logits whatever the schedule."""
    runner = make_runner(toy.source, profile, max_batch=4, kv_tokens=512)
    theirs = toy.logits(prompt[:60])
    runner.add(0)
    assert_close(runner.verify([Chunk(0, prompt[:40])]), theirs[:40])
    assert_close(runner.decode([0], [prompt[40]])[0], theirs[40])
    runner.fork(0, 1, 35)
    assert_close(runner.prefill([Chunk(1, prompt[35:50])])[0], theirs[49])
    assert_close(runner.decode([0, 1], [prompt[41], prompt[50]]), theirs[[41, 50]])


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"scale_attn_weights": False},
        {"n_inner": 100, "activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_every_kind_of_model(
    changes: dict[str, object],
    make_model: MakeModel,
    make_runner: MakeRunner,
    prompt: list[int],
) -> None:
    model = make_model(**changes)
    runner = make_runner(model.source, max_batch=4, kv_tokens=512)
    ids = [i % model.source.config.vocab_size for i in prompt[:40]]
    theirs = model.logits(ids)
    runner.add(0)
    assert_close(runner.prefill([Chunk(0, ids[:37])])[0], theirs[36])
    for position in (37, 38, 39):
        assert_close(runner.decode([0], [ids[position]])[0], theirs[position])


def test_after_preemption(toy: Judged, make_runner: MakeRunner, prompt: list[int]) -> None:
    """Four sequences in a cache that holds two: every token is still transformers'."""
    runner = make_runner(toy.source, max_batch=4, max_step_tokens=32, kv_tokens=160)
    engine = Engine(runner, EngineConfig(max_running=4, prefill_chunk_tokens=32))
    heads = [prompt[i * 40 : i * 40 + 20 + i] for i in range(4)]

    async def generate() -> list[list[int]]:
        streams = [engine.submit(head, SamplingParams(64, temperature=0)) for head in heads]

        async def tokens(stream: object) -> list[int]:
            return [e.token_id async for e in stream if isinstance(e, TokenEvent)]  # type: ignore[attr-defined]

        done = await asyncio.gather(*map(tokens, streams))
        await engine.drain(10)
        return list(done)

    engine.start()
    assert asyncio.run(generate()) == [toy.greedy(head, 64) for head in heads]
