"""The engine's page accounting against the runner's, after every one of many random operations."""

from __future__ import annotations

import numpy as np
import pytest

from serve.engine import Chunk
from serve.engine.kv_budget import KVBudget
from serve.runtime.runner import TVMRunner
from tests.parity.conftest import Judged, MakeRunner

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["baseline", "full"])
def paged(request: pytest.FixtureRequest, toy: Judged, make_runner: MakeRunner) -> TVMRunner:
    """Over TVM's KV cache, and over pages of our own."""
    return make_runner(toy.source, request.param, max_batch=8, max_step_tokens=384, kv_tokens=2048)


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_the_runners(seed: int, paged: TVMRunner) -> None:
    runner = paged
    random = np.random.default_rng(seed)
    limits = runner.limits
    budget = KVBudget(limits.num_pages, limits.page_size)
    lengths: dict[int, int] = {}
    for new in range(150):
        operation = random.choice(["add", "fork", "append", "append", "release"])
        known = list(lengths)
        chosen = int(random.choice(known)) if known else -1
        if operation == "add" or not known:
            budget.add(new)
            runner.add(new)
            lengths[new] = 0
            operation, chosen = "append", new
        if operation == "fork" and lengths[chosen]:
            shared = int(random.integers(1, lengths[chosen] + 1))
            if not budget.num_free:
                continue
            budget.fork(chosen, new, shared)
            runner.fork(chosen, new, shared)
            lengths[new] = shared
        elif operation == "append":
            count = int(random.integers(1, 40))
            if budget.needed(chosen, count) > budget.num_free or lengths[chosen] + count > 384:
                continue
            budget.append(chosen, count)
            runner.prefill([Chunk(chosen, [1] * count)])
            lengths[chosen] += count
        elif operation == "release":
            budget.release(chosen)
            runner.release(chosen)
            del lengths[chosen]
        assert runner.num_free_pages() == budget.num_free
    for seq_id in lengths:
        runner.release(seq_id)
    assert runner.num_free_pages() == limits.num_pages
