"""The golden test.

Under every profile the bundled model recites the Gettysburg Address to its end.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

from serve.engine import Chunk
from serve.model.source import find_model
from serve.tokenizer import Tokenizer
from tests.parity.conftest import PROFILES, MakeRunner

pytestmark = pytest.mark.parity

BEGINNING = "Four score and seven years ago"


@pytest.mark.parametrize("profile", PROFILES)
def test_recital(profile: str, make_runner: MakeRunner) -> None:
    tokenizer = Tokenizer.bundled()
    runner = make_runner(find_model("bundled:gettysburg"), profile, kv_tokens=1024)
    prompt = tokenizer.encode(BEGINNING)
    recited: list[int] = []
    runner.add(0)
    logits = runner.prefill([Chunk(0, prompt)])
    while not recited or recited[-1] != tokenizer.eos_token_id:
        assert len(prompt) + len(recited) < 400
        recited.append(int(np.argmax(logits[0])))
        logits = runner.decode([0], [recited[-1]])
    address = (files("serve") / "data" / "gettysburg.txt").read_text(encoding="utf-8")
    assert BEGINNING + tokenizer.decode(recited[:-1]) == address
