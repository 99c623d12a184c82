"""The engine's page accounting against TVM's own, after every one of many random operations."""

from __future__ import annotations

import numpy as np
import pytest

from serve.engine import Chunk
from serve.engine.kv_budget import KVBudget
from serve.runtime.runner import TVMRunner

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_tvms(seed: int, runner: TVMRunner) -> None:
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
