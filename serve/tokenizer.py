"""Text to GPT-2's token ids and back, whole or a token at a time.

Knows the files a byte-level BPE comes in; knows nothing of models, HTTP or stop strings.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from serve.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
_BUNDLED = "data/gpt2/vocab.bpe"
_BUNDLED_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


class Tokenizer:
    """A byte-level BPE: every text has ids, and every id has exact bytes. Threads may share one."""

    def __init__(self, backend: Backend, eos_token: str = END_OF_TEXT) -> None:
        eos_token_id = backend.token_to_id(eos_token)
        if eos_token_id is None:
            raise TokenizerError(f"the vocabulary has no end-of-text token {eos_token!r}")
        backend.no_truncation()  # a tokenizer.json may ask for either; a prompt is never cut
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._bytes = _bytes_by_id(backend, added)
        self.eos_token_id: int = eos_token_id
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def bundled(cls) -> Tokenizer:
        """GPT-2's own, from the vocab.bpe shipped with this package."""
        data = (resources.files("serve") / _BUNDLED).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != _BUNDLED_SHA256:
            raise TokenizerError(
                f"serve/{_BUNDLED} is damaged: expected sha256 {_BUNDLED_SHA256}, found {found}"
            )
        return cls(_from_merges(data.decode("utf-8")))

    @classmethod
    def of_model(cls, folder: Path | None) -> Tokenizer:
        """The model's own, if its folder has one, or GPT-2's."""
        names = ("tokenizer.json", "vocab.json", "vocab.bpe")
        if folder is not None and any((folder / name).exists() for name in names):
            return cls.from_folder(folder)
        return cls.bundled()

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder; of several kinds the first listed wins."""
        folder = Path(path)
        eos_token = _eos_token(_settings(folder))
        for names, read in _READERS.items():
            if all((folder / name).is_file() for name in names):
                with _errors_named(folder / names[0]):
                    return cls(read(folder), eos_token)
        wanted = ", ".join(" with ".join(names) for names in _READERS)
        raise TokenizerError(f"no tokenizer in {folder}: looked for {wanted}")

    @property
    def vocab_size(self) -> int:
        """Number of ids, which run from 0 to one less."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a special token written out in it becomes that token's id.

        Raises TokenizerError for a lone surrogate, which has no bytes.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} "
                f"at character {error.start}"
            ) from None
        # A batch of one: unlike encode(), it leaves the GIL to other threads meanwhile.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens written out; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The tokens' exact bytes; TokenizerError names an id outside the vocabulary."""
        if len(ids) and (min(ids) < 0 or max(ids) >= len(self._bytes)):
            outside = next(i for i in ids if not 0 <= i < len(self._bytes))
            raise TokenizerError(
                f"token id {outside} is outside the vocabulary (0 to {len(self._bytes) - 1})"
            )
        return b"".join([self._bytes[i] for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """One token's exact bytes, often not whole characters."""
        return self.decode_bytes((token_id,))

    def symbols(self, token_id: int) -> str:
        """A token of the vocabulary as its files write it, where a space is Ġ."""
        symbols = self._backend.id_to_token(token_id)
        assert symbols is not None, token_id
        return symbols

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """A new incremental decoder, for one sequence."""
        return Detokenizer(self, skip_special)


class Detokenizer:
    """Decodes one sequence token by token, never emitting half a character.

    All pushes and finish() joined are `Tokenizer.decode` of all ids (special ones left out, if
    skipped).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often empty."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def num_before(self, token_id: int) -> int:
        """Of the characters that push(token_id) would return, those before the token's own first.

        They are what is left of an unfinished character, where the token does not go on with it.
        """
        pending, _ = self._utf8.getstate()
        if not pending or token_id in self._skipped:
            return 0
        probe = codecs.getincrementaldecoder("utf-8")("replace")
        text = probe.decode(pending + self._tokenizer.token_bytes(token_id)[:1])
        is_begun, _ = probe.getstate()  # the token's first byte is not whole, either
        return len(text) if is_begun else len(text) - 1

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _byte_symbols() -> dict[str, int]:
    """GPT-2's symbol → byte, in id order: printable ones are themselves, the rest U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _bytes_by_id(backend: Backend, added: dict[int, AddedToken]) -> list[bytes]:
    """Each id's bytes: an added token stands for its own text, any other for its byte symbols."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        raise TokenizerError("not a byte-level BPE such as GPT-2's: its decoder is not ByteLevel")
    symbols = _byte_symbols()
    vocab = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    table = []
    for expected, (token, token_id) in enumerate(vocab):
        if token_id != expected:
            raise TokenizerError(f"no token, or more than one, has id {min(expected, token_id)}")
        if token_id not in added and not symbols.keys() >= set(token):
            raise TokenizerError(f"token {token!r} (id {token_id}) is not made of byte symbols")
        table.append(token.encode() if token_id in added else bytes(symbols[c] for c in token))
    return table


def _byte_level(bpe: models.BPE, special: Sequence[str], add_prefix_space: bool) -> Backend:
    backend = Backend(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return backend


def _from_merges(text: str) -> Backend:
    """From vocab.bpe alone: ids are the byte symbols, then a token a merge, then end-of-text."""
    vocab = {symbol: token_id for token_id, symbol in enumerate(_byte_symbols())}
    merges = []
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        if line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right in vocab:
            raise TokenizerError(f"line {number}: {line!r} is not a merge of two earlier tokens")
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    return _byte_level(models.BPE(vocab, merges), [END_OF_TEXT], add_prefix_space=False)


def _read_tokenizer_json(folder: Path) -> Backend:
    return Backend.from_file(str(folder / "tokenizer.json"))


def _read_vocab_json(folder: Path) -> Backend:
    settings = _settings(folder)
    bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    special = list(dict.fromkeys((END_OF_TEXT, _eos_token(settings))))
    backend = _byte_level(bpe, special, bool(settings.get("add_prefix_space")))
    unread = _json_object(folder / "added_tokens.json").keys() - backend.get_vocab().keys()
    if unread:  # how to read them is spread over several files; a tokenizer.json has it in one
        raise TokenizerError(
            f"added_tokens.json adds {', '.join(sorted(unread))}: that needs a tokenizer.json; "
            "save the tokenizer again with transformers to get one"
        )
    return backend


def _read_vocab_bpe(folder: Path) -> Backend:
    return _from_merges((folder / "vocab.bpe").read_text("utf-8"))


_READERS: dict[tuple[str, ...], Callable[[Path], Backend]] = {
    ("tokenizer.json",): _read_tokenizer_json,
    ("vocab.json", "merges.txt"): _read_vocab_json,
    ("vocab.bpe",): _read_vocab_bpe,
}


def _settings(folder: Path) -> dict[str, Any]:
    names = ("special_tokens_map.json", "tokenizer_config.json")
    return {key: value for name in names for key, value in _json_object(folder / name).items()}


def _json_object(file: Path) -> dict[str, Any]:
    """The object in `file`, empty if there is no such file."""
    if not file.is_file():
        return {}
    with _errors_named(file):
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise TokenizerError("expected a JSON object")
        return found


def _eos_token(settings: dict[str, Any]) -> str:
    found = settings.get("eos_token") or END_OF_TEXT
    return str(found.get("content") if isinstance(found, dict) else found)


@contextmanager
def _errors_named(file: Path) -> Iterator[None]:
    """Whatever goes wrong in reading becomes a TokenizerError that names the file."""
    try:
        yield
    except Exception as error:  # the tokenizers library raises Exception itself
        raise TokenizerError(f"{file}: {error}") from error
