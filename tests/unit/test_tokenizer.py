"""The tokenizer alone: round trips, incremental decoding, the kinds of folder, every error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from serve.errors import TokenizerError
from serve.tokenizer import END_OF_TEXT, Tokenizer

pytestmark = pytest.mark.unit

DATA = resources.files("serve") / "data"
GPT2 = Tokenizer.bundled()
IDS = st.lists(st.integers(0, GPT2.vocab_size - 1), max_size=30)
# Ids of single bytes and of multi-byte tails, so that characters often span tokens.
RAGGED_IDS = st.lists(
    st.sampled_from([i for i in range(50_257) if not GPT2.token_bytes(i).isascii()]), max_size=30
)
# Any text that has bytes, with what the pattern and the special tokens treat specially.
PIECES = st.one_of(
    st.text(),
    st.sampled_from([END_OF_TEXT, "<|endof", "'s", "'LL", "  ", "\n\n", "\r\n", "\u3000", "\x00"]),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def byte_level(vocab: dict[str, int], merges: Sequence[tuple[str, str]] = ()) -> Backend:
    backend = Backend(models.BPE(vocab, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.fixture
def backend() -> Backend:
    """256 byte symbols, then "he" (256), "ll" (257), "hell" (258) and end-of-text (259)."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tiny = byte_level(vocab, [("h", "e"), ("l", "l"), ("he", "ll")])
    tiny.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tiny


@pytest.fixture
def tiny(tmp_path: Path, backend: Backend) -> Path:
    """A folder with the backend's vocab.json and merges.txt."""
    backend.model.save(str(tmp_path))
    return tmp_path


# --- the bundled vocabulary


def test_the_bundled_vocabulary_is_gpt2s() -> None:
    assert GPT2.vocab_size == 50_257
    assert GPT2.eos_token_id == 50_256
    assert GPT2.special_ids == {50_256}
    assert GPT2.token_bytes(50_256) == END_OF_TEXT.encode()
    assert GPT2.token_bytes(198) == b"\n"
    assert GPT2.token_bytes(50_255) == b" gazed"
    assert len({GPT2.token_bytes(i) for i in range(GPT2.vocab_size)}) == GPT2.vocab_size
    assert {GPT2.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}


def test_known_texts() -> None:
    assert GPT2.encode("") == []
    assert GPT2.encode("Hello world") == [15_496, 995]
    assert GPT2.encode(" Hello world") == [18_435, 995]
    assert GPT2.encode(f"a{END_OF_TEXT}b") == [64, 50_256, 65]
    assert GPT2.encode("<|endoftext") == GPT2.encode("<|") + GPT2.encode("endoftext")


def test_the_gettysburg_address_is_320_tokens() -> None:
    text = (DATA / "gettysburg.txt").read_text("utf-8")
    ids = GPT2.encode(text)
    assert len(ids) == 320
    assert GPT2.decode(ids) == text


@pytest.mark.parametrize("change", [bytes.upper, lambda data: data[:-9], lambda _: b""])
def test_a_damaged_bundled_file_is_refused(
    change: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data/gpt2/vocab.bpe"
    file.parent.mkdir(parents=True)
    file.write_bytes(change((DATA / "gpt2" / "vocab.bpe").read_bytes()))
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(TokenizerError, match=r"vocab\.bpe is damaged: expected sha256 1ce1664"):
        Tokenizer.bundled()


# --- encode and decode


@settings(deadline=None)
@given(TEXTS)
@example("\ud7ff\ue000\uffff\U0010ffff")
def test_text_survives_the_round_trip(text: str) -> None:
    ids = GPT2.encode(text)
    assert GPT2.decode_bytes(ids) == text.encode()
    assert GPT2.decode(ids) == text


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_read_as_text_come_back(data: bytes) -> None:
    """As Latin-1 any bytes are a text; as UTF-8 with U+FFFD for what is invalid, too."""
    latin = data.decode("latin-1")
    assert GPT2.decode_bytes(GPT2.encode(latin)).decode().encode("latin-1") == data
    replaced = data.decode("utf-8", "replace")
    assert GPT2.decode_bytes(GPT2.encode(replaced)) == replaced.encode()


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_can_be_written_in_ids(data: bytes) -> None:
    id_of = {GPT2.token_bytes(i): i for i in range(256)}
    ids = [id_of[bytes([byte])] for byte in data]
    assert GPT2.decode_bytes(ids) == data
    assert GPT2.decode(ids) == data.decode("utf-8", "replace")


@settings(deadline=None)
@given(IDS)
def test_decode_is_the_tokens_bytes_joined(ids: list[int]) -> None:
    joined = b"".join(GPT2.token_bytes(i) for i in ids)
    assert GPT2.decode_bytes(ids) == joined
    assert GPT2.decode(ids) == joined.decode("utf-8", "replace")


@pytest.mark.parametrize("run", ["a", " ", "\n", "é", "1", "a ", "\U0001f600", END_OF_TEXT])
def test_a_very_long_run(run: str) -> None:
    assert GPT2.decode(GPT2.encode(run * 20_000)) == run * 20_000


@pytest.mark.parametrize("surrogate", [0xD800, 0xDBFF, 0xDC00, 0xDFFF])
def test_text_that_is_not_unicode_is_refused(surrogate: int) -> None:
    expected = rf"not valid Unicode: lone surrogate U\+{surrogate:04X} at character 2"
    with pytest.raises(TokenizerError, match=expected):
        GPT2.encode(f"é{END_OF_TEXT[0]}{chr(surrogate)}b")


@pytest.mark.parametrize("bad", [-1, 50_257, 1 << 70])
def test_an_id_outside_the_vocabulary_is_named(bad: int) -> None:
    expected = rf"token id {bad} is outside the vocabulary \(0 to 50256\)"
    for call in (GPT2.decode, GPT2.decode_bytes):
        with pytest.raises(TokenizerError, match=expected):
            call([0, bad, 1])
    for call_one in (GPT2.token_bytes, GPT2.detokenizer().push):
        with pytest.raises(TokenizerError, match=expected):
            call_one(bad)


# --- incremental decoding


@settings(deadline=None)
@given(st.one_of(IDS, RAGGED_IDS))
def test_pushes_and_finish_join_to_decode(ids: list[int]) -> None:
    detokenizer = GPT2.detokenizer(skip_special=False)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == GPT2.decode(ids)


@settings(deadline=None)
@given(TEXTS)
def test_no_push_emits_half_a_character(text: str) -> None:
    """Of a valid text, what is out is always a beginning: never a U+FFFD to be taken back."""
    detokenizer, seen = GPT2.detokenizer(skip_special=False), ""
    for token_id in GPT2.encode(text):
        seen += detokenizer.push(token_id)
        assert text.startswith(seen)
    assert seen == text
    assert detokenizer.finish() == ""


@settings(deadline=None)
@given(st.lists(st.one_of(st.just(50_256), st.integers(0, 50_256)), max_size=20))
def test_special_tokens_are_skipped_unless_asked_for(ids: list[int]) -> None:
    detokenizer = GPT2.detokenizer()
    shown = [i for i in ids if i != 50_256]
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == GPT2.decode(shown)


def test_an_unfinished_character_waits_and_an_invalid_one_does_not() -> None:
    id_of = {GPT2.token_bytes(i): i for i in range(256)}
    detokenizer = GPT2.detokenizer()
    out = [detokenizer.push(id_of[bytes([byte])]) for byte in b"\xe2\x82\xac\xe2\x82a\xff\xf0\x9f"]
    assert out == ["", "", "€", "", "", "\ufffda", "\ufffd", "", ""]
    assert detokenizer.finish() == "\ufffd"


# --- folders


def test_the_three_kinds_of_folder_agree(tmp_path: Path, tiny: Path, backend: Backend) -> None:
    merges_only, one_file = tmp_path / "bpe", tmp_path / "json"
    merges_only.mkdir()
    one_file.mkdir()
    shutil.copy(tiny / "merges.txt", merges_only / "vocab.bpe")
    backend.save(str(one_file / "tokenizer.json"))
    ids = [258, 78, 220, 259]
    for folder in (tiny, merges_only, one_file):
        tokenizer = Tokenizer.from_folder(str(folder))
        assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (260, 259)
        assert tokenizer.special_ids == {259}
        assert tokenizer.encode(f"hello {END_OF_TEXT}") == ids
        assert tokenizer.decode(ids) == f"hello {END_OF_TEXT}"


def test_tokenizer_json_is_preferred(tiny: Path, backend: Backend) -> None:
    backend.add_tokens([AddedToken("hello")])
    backend.save(str(tiny / "tokenizer.json"))
    assert Tokenizer.from_folder(tiny).encode("hello") == [260]


def test_a_tokenizer_json_never_cuts_or_pads_a_prompt(tiny: Path, backend: Backend) -> None:
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tiny / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tiny)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.decode(tokenizer.encode("one two three")) == "one two three"


def test_nothing_is_put_before_or_after_a_prompt(tiny: Path, backend: Backend) -> None:
    """Even where a tokenizer.json has a template for it: a prompt is what the client wrote."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 259)]
    )
    backend.save(str(tiny / "tokenizer.json"))
    assert Tokenizer.from_folder(tiny).encode("hell") == [258]


def test_added_tokens_stand_for_their_own_text(tiny: Path, backend: Backend) -> None:
    backend.add_special_tokens([AddedToken("<|é ☃|>", special=True)])
    backend.add_tokens([AddedToken("été")])
    backend.save(str(tiny / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tiny)
    ids = tokenizer.encode("<|é ☃|>été")
    assert ids == [260, 261]
    assert tokenizer.decode(ids) == "<|é ☃|>été"
    assert tokenizer.special_ids == {259, 260}
    assert "".join(map(tokenizer.detokenizer().push, ids)) == "été"


@pytest.mark.parametrize("eos", ["hell", {"content": "hell", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_folders_own_end_of_text_token(tiny: Path, name: str, eos: object) -> None:
    write_json(tiny / name, {"eos_token": eos})
    tokenizer = Tokenizer.from_folder(tiny)
    assert tokenizer.eos_token_id == 258
    assert tokenizer.special_ids == {258, 259}


def test_a_folder_that_wants_a_space_before_the_first_word(tiny: Path) -> None:
    write_json(tiny / "tokenizer_config.json", {"add_prefix_space": True})
    tokenizer = Tokenizer.from_folder(tiny)
    assert tokenizer.decode(tokenizer.encode("hello")) == " hello"


@pytest.mark.parametrize("absent", ["vocab.json", "merges.txt"])
def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tiny: Path, absent: str) -> None:
    (tiny / absent).unlink()
    looked_for = r"looked for tokenizer\.json, vocab\.json with merges\.txt, vocab\.bpe"
    with pytest.raises(TokenizerError, match=looked_for):
        Tokenizer.from_folder(tiny)
    with pytest.raises(TokenizerError, match=looked_for):
        Tokenizer.from_folder(tiny / "absent")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: "),
        ("tokenizer.json", "{}", r"tokenizer\.json: "),
        ("vocab.json", "[]", r"vocab\.json: "),
        ("vocab.json", '{"a": 0}', r"vocab\.json: .*out of vocabulary"),
        ("merges.txt", "h e\nl\n", r"vocab\.json: "),
        ("merges.txt", "h zz\n", r"vocab\.json: .*out of vocabulary"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: "),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object"),
        ("tokenizer_config.json", "\ufeff{}", r"tokenizer_config\.json: "),
        ("added_tokens.json", '{"[PAD]": 260}', r"adds \[PAD\]: that needs a tokenizer\.json"),
    ],
)
def test_a_malformed_file_is_named(tiny: Path, name: str, content: str, message: str) -> None:
    (tiny / name).write_text(content, "utf-8")
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tiny)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#version: 0.2\nh e\nl\n", r"vocab\.bpe: line 3: 'l' is not a merge"),
        (b"h e\nhe zz\n", r"line 2: 'he zz' is not a merge"),
        (b"h e\nh e\n", r"line 2: 'h e' is not a merge"),
        (b"h e l\n", r"line 1: 'h e l' is not a merge"),
        (b"", r"line 1: '' is not a merge"),
        (b"\xff\n", r"vocab\.bpe: .*codec can't decode"),
    ],
)
def test_a_malformed_vocab_bpe_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "vocab.bpe").write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_a_vocab_bpe_with_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "vocab.bpe").write_bytes(b"#version: 0.2\r\nh e\r\nl l\r\n")
    assert Tokenizer.from_folder(tmp_path).encode("hell") == [256, 257]


def test_added_tokens_json_that_adds_nothing_is_no_obstacle(tiny: Path) -> None:
    write_json(tiny / "added_tokens.json", {END_OF_TEXT: 259})
    assert Tokenizer.from_folder(tiny).vocab_size == 260


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"a": 0, END_OF_TEXT: 2}, "no token, or more than one, has id 1"),
        ({"a": 0, "b": 0, END_OF_TEXT: 1}, "no token, or more than one, has id 0"),
        ({"a": 0, "日": 1, END_OF_TEXT: 2}, r"'日' \(id 1\) is not made of byte symbols"),
        ({"a": 0}, r"has no end-of-text token '<\|endoftext\|>'"),
    ],
)
def test_a_vocabulary_that_cannot_be_served(vocab: dict[str, int], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(byte_level(vocab))


def test_another_kind_of_tokenizer_is_refused() -> None:
    backend = Backend(models.WordLevel({"a": 0, END_OF_TEXT: 1}, unk_token="a"))
    with pytest.raises(TokenizerError, match="not a byte-level BPE"):
        Tokenizer(backend)


# --- seeded, beyond what hypothesis' budget reaches


def test_a_thousand_random_id_sequences() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        ids = [rng.randrange(GPT2.vocab_size) for _ in range(rng.randrange(64))]
        detokenizer = GPT2.detokenizer(skip_special=False)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == GPT2.decode(ids)


@pytest.mark.parametrize(
    ("before", "token", "number"),
    [
        (b"", b"a", 0),
        (b"\xe2\x82", b"\xac", 0),  # goes on
        (b"\xf0\x9f", b"\x98", 0),
        (b"\xe2\x82", b"a", 1),
        (b"\xe2\x82", b"\xe2", 1),  # begins another one
        (b"\xe2\x82", b"\xff", 1),  # is one of its own
        (b"\xf0\x9f\x98", b"the", 1),
    ],
)
def test_where_a_token_begins_in_what_it_makes_certain(
    before: bytes, token: bytes, number: int
) -> None:
    id_of = {GPT2.token_bytes(i): i for i in range(GPT2.vocab_size)}
    detokenizer = GPT2.detokenizer()
    for byte in before:
        detokenizer.push(id_of[bytes([byte])])
    assert detokenizer.num_before(id_of[token]) == number
    assert detokenizer.push(id_of[token]).startswith("\ufffd" * number)
    assert detokenizer.num_before(GPT2.eos_token_id) == 0
