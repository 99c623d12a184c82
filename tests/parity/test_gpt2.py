"""The real shapes: synthetic:gpt2 against transformers on the same weights, 64 greedy steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from serve.engine import Chunk
from serve.model.parameters import is_conv1d
from serve.model.source import ModelSource, find_model
from tests.parity.conftest import Judged, MakeRunner, assert_close

pytestmark = pytest.mark.parity


def in_transformers(source: ModelSource) -> Judged:
    model = GPT2LMHeadModel(GPT2Config()).eval()
    state = {
        name: torch.from_numpy(np.ascontiguousarray(array.T) if is_conv1d(name) else array)
        for name, array in source.load().items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return Judged(model, source)


def test_gpt2(make_runner: MakeRunner) -> None:
    model = in_transformers(find_model("synthetic:gpt2"))
    runner = make_runner(model.source, max_batch=2, kv_tokens=1024)
    prompt = [int(i) for i in np.random.default_rng(1).integers(0, 50257, 40)]
    tokens = model.greedy(prompt, 64)
    theirs = model.logits(prompt + tokens)
    runner.add(0)
    ours = runner.prefill([Chunk(0, prompt[:33])])
    assert_close(ours[0], theirs[32])
    ours = runner.prefill([Chunk(0, prompt[33:])])
    rows = []
    for step, token in enumerate(tokens):
        rows.append(ours)
        assert_close(ours[0], theirs[len(prompt) + step - 1])
        ours = runner.decode([0], [token])
    runner.add(1)  # the same bits as computed at once
    whole = runner.verify([Chunk(1, prompt + tokens)])
    assert np.concatenate([*rows, ours]).tobytes() == whole[len(prompt) - 1 :].tobytes()
    runner.release(1)
    runner.fork(0, 1, 50)
    ours = runner.decode([0, 1], [tokens[-1], (prompt + tokens)[50]])
    assert_close(ours[1], theirs[50])
