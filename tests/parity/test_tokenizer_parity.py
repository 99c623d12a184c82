"""The same ids as transformers' GPT-2 tokenizer, and as the algorithm OpenAI published.

transformers 5 stands on the same Rust library as we do, so that alone would prove little: the
published algorithm, a few lines of Python here, is the second, independent judge.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer, GPT2TokenizerFast

from serve.tokenizer import END_OF_TEXT, Tokenizer

pytestmark = pytest.mark.parity

Encode = Callable[[str], list[int]]

DATA = resources.files("serve") / "data"
OURS = Tokenizer.bundled()
LINES = (DATA / "gpt2" / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]
GETTYSBURG = (DATA / "gettysburg.txt").read_text("utf-8")

# OpenAI's encoder.py (github.com/openai/gpt-2, src), its pattern letter for letter.
PATTERN = regex.compile(
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)
RANKS = {
    (left, right): rank for rank, (left, _, right) in enumerate(x.partition(" ") for x in LINES)
}


# The pattern asks Unicode's tables what is a letter, and the two libraries' tables differ in age:
# they may cut a character differently that one of them does not know yet. Python knows the fewest.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))

FRAGMENTS = [
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n"),
    *("\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "\u2019s", "'", "''"),
    *("0", "12", " 345", "6789", "1,000.50", "²", "½", "٣", "Ⅷ"),
    *("the", " the", "The", "don't", "I'll", "naïve", "e\u0301", "日本語", "Привет", "ß", "ﬁ"),
    *("\U0001f600", "☃\ufe0f", "\U0001f1e8\U0001f1ed"),
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    *("\x00", "\x07", "\x1b[0m", "\x7f", "\ufeff", "\u200b", "\ufffd", "\uffff", "\U0010ffff"),
    *(".", "...", "!?", "--", "_", "http://a.b/c?d=e", '{"k": [1]}', "#version", "Ġ", "Ċ"),
    *(END_OF_TEXT, END_OF_TEXT[:-1], "<|", "|>", "endoftext", "<|EndOfText|>"),
]
EXAMPLES = [
    "",
    *FRAGMENTS,
    f"{END_OF_TEXT}{GETTYSBURG}\n",
    f" {END_OF_TEXT} a {END_OF_TEXT}{END_OF_TEXT}  b",
    f"<|{END_OF_TEXT}|>",
    "we'll've done'it's they'RE",
    "  leading, trailing  \n\n  lines \t",
    "def f(x):\n    return x  # 2\n\n\nprint(f(10_000))\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa AAAAAAAAAAAAAAAAAAAAAAA 000000000000000000000000",
]


def is_assigned(character: str) -> bool:
    return unicodedata.category(character) not in ("Cs", "Cn")


def random_text(rng: random.Random) -> str:
    """Fragments, words of the Gettysburg Address, and characters of every plane."""
    words = GETTYSBURG.split(" ")

    def character() -> str:
        found = chr(rng.randrange(1 << rng.randint(7, 20)))  # as many small ones as large
        return found if is_assigned(found) else " "

    makers: list[Callable[[], str]] = [
        lambda: rng.choice(FRAGMENTS),
        lambda: rng.choice(words) + " " * rng.randrange(3),
        character,
    ]
    return "".join(rng.choice(makers)() for _ in range(rng.randrange(40)))


def decoded(transformers: GPT2Tokenizer, ids: list[int]) -> str:
    return str(transformers.decode(ids, clean_up_tokenization_spaces=False))


@cache
def byte_symbols() -> dict[int, str]:
    """OpenAI's bytes_to_unicode()."""
    codes = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    codes += range(ord("®"), ord("ÿ") + 1)
    symbols = {code: chr(code) for code in codes}
    return symbols | {
        code: chr(256 + n) for n, code in enumerate(c for c in range(256) if c not in symbols)
    }


@cache
def vocabulary() -> dict[str, int]:
    tokens = [*byte_symbols().values(), *(line.replace(" ", "") for line in LINES), END_OF_TEXT]
    return {token: token_id for token_id, token in enumerate(tokens)}


def merged(word: list[str]) -> list[str]:
    """Merge the best-ranked pair, all its occurrences from the left, until no pair has a rank."""
    while pairs := [pair for pair in pairwise(word) if pair in RANKS]:
        best, word, old = min(pairs, key=RANKS.__getitem__), [], word
        while old:
            num = 2 if tuple(old[:2]) == best else 1
            word.append("".join(old[:num]))
            old = old[num:]
    return word


def published(text: str) -> list[int]:
    """The ids by OpenAI's algorithm; like transformers, with end-of-text written in the text."""
    ids: list[int] = []
    for number, part in enumerate(text.split(END_OF_TEXT)):
        ids += [vocabulary()[END_OF_TEXT]] * (number > 0)
        for piece in PATTERN.findall(part):
            symbols = [byte_symbols()[byte] for byte in piece.encode()]
            ids += [vocabulary()[token] for token in merged(symbols)]
    return ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder that transformers reads: vocab.json and merges.txt, from vocab.bpe."""
    made: Path = tmp_path_factory.mktemp("gpt2")
    (made / "vocab.json").write_text(json.dumps(vocabulary()), "utf-8")
    (made / "merges.txt").write_text("\n".join(["#version: 0.2", *LINES, ""]), "utf-8")
    return made


@pytest.fixture(scope="module", params=[GPT2Tokenizer, GPT2TokenizerFast, "published"])
def theirs(request: pytest.FixtureRequest, folder: Path) -> Encode:
    if request.param == "published":
        return published
    tokenizer = request.param.from_pretrained(folder, local_files_only=True)
    return lambda text: list(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def transformers(folder: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(folder, local_files_only=True)


def test_the_vocabulary(transformers: GPT2Tokenizer) -> None:
    assert transformers.get_vocab() == vocabulary()
    assert OURS.vocab_size == len(transformers)
    assert OURS.eos_token_id == transformers.eos_token_id
    for token_id in range(OURS.vocab_size):
        assert OURS.decode([token_id]) == decoded(transformers, [token_id])


def test_the_gettysburg_address(theirs: Encode) -> None:
    ids = OURS.encode(GETTYSBURG)
    assert len(ids) == 320
    assert ids == theirs(GETTYSBURG)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples(theirs: Encode, text: str) -> None:
    assert OURS.encode(text) == theirs(text)


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(ASSIGNED)), max_size=12))
def test_fragments_side_by_side(theirs: Encode, fragments: list[str]) -> None:
    text = "".join(fragments)
    assert OURS.encode(text) == theirs(text)


@settings(deadline=None)
@given(st.text())
def test_any_text_at_all(transformers: GPT2Tokenizer, text: str) -> None:
    assert OURS.encode(text) == transformers(text)["input_ids"]


def test_two_thousand_random_texts(theirs: Encode) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng)
        assert OURS.encode(text) == theirs(text), repr(text)


def test_every_assigned_character_among_spaces_and_words(theirs: Encode) -> None:
    assigned = [c for c in map(chr, range(0x110000)) if is_assigned(c)]
    for block in (assigned[at : at + 500] for at in range(0, len(assigned), 500)):
        text = "".join(f"  {c}  the{c} {c}1\n\n{c}\n" for c in block)
        assert OURS.encode(text) == theirs(text), f"U+{ord(block[0]):04X} and the 499 after it"


@pytest.mark.parametrize("run", ["a", " ", "\n", "é", "7", "!", "a ", "\U0001f600", END_OF_TEXT])
def test_a_very_long_run(transformers: GPT2Tokenizer, run: str) -> None:
    text = run * 20_000
    assert OURS.encode(text) == transformers(text)["input_ids"]


@settings(deadline=None)
@given(st.lists(st.integers(0, OURS.vocab_size - 1), max_size=30))
def test_decode(transformers: GPT2Tokenizer, ids: list[int]) -> None:
    assert OURS.decode(ids) == decoded(transformers, ids)


def test_a_folder_reads_as_transformers_reads_it(folder: Path, tmp_path: Path) -> None:
    """Both from vocab.json with merges.txt and from the tokenizer.json that transformers saves."""
    GPT2Tokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(200)]
    for path in (folder, tmp_path):
        tokenizer = Tokenizer.from_folder(path)
        assert tokenizer.special_ids == OURS.special_ids
        assert [tokenizer.encode(text) for text in texts] == [OURS.encode(text) for text in texts]
