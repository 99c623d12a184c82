"""The Gettysburg workload against GPT-2's own merges and against the server's copy of the text."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from loadtest.workload import DATA, Workload, gettysburg_ids

pytestmark = pytest.mark.loadtest

SERVE_DATA = Path(str(resources.files("serve"))) / "data"
END_OF_TEXT = 50256


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    """GPT-2's byte-level BPE, built from vocab.bpe without any code of the server."""
    lines = (SERVE_DATA / "gpt2" / "vocab.bpe").read_text("utf-8").splitlines()
    merges = [(left, right) for left, right in (line.split() for line in lines[1:])]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    vocabulary = {name: i for i, name in enumerate([*symbols, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_the_ids_are_those_of_the_text(gpt2: Tokenizer) -> None:
    text = (DATA / "gettysburg.txt").read_text("utf-8")
    address, newline = gpt2.encode(text).ids, gpt2.encode("\n").ids
    assert (len(address), newline) == (320, [198])
    assert list(gettysburg_ids()) == [END_OF_TEXT, *address, *newline]
    assert len(gettysburg_ids()) == 322


def test_the_text_is_the_servers() -> None:
    ours, theirs = DATA / "gettysburg.txt", SERVE_DATA / "gettysburg.txt"
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("length", [1, 321, 322, 323, 1000])
def test_another_length_cuts_or_repeats_the_ids(length: int) -> None:
    ids = Workload(num_prompt_tokens=length).prompt_ids()
    assert len(ids) == length
    assert all(ids[i] == gettysburg_ids()[i % 322] for i in range(length))


def test_the_body_asks_for_a_greedy_stream_of_exactly_that_many_tokens() -> None:
    assert Workload().body("gpt2@full") == {
        "model": "gpt2@full",
        "prompt": list(gettysburg_ids()),
        "max_tokens": 64,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_salt_is_sent_only_if_there_is_one() -> None:
    assert Workload().body("gpt2", "pepper")["cache_salt"] == "pepper"
    assert "cache_salt" not in Workload().body("gpt2")


@pytest.mark.parametrize("lengths", [(0, 64), (322, 0), (-1, 64)])
def test_a_length_below_one_is_refused(lengths: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        Workload(*lengths)
