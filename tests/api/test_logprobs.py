"""Log-probabilities: a list entry for each token, aligned with the text, in every combination."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.api.choice import Choice, Wanted
from serve.api.logprobs import completion_logprobs, token_text
from serve.engine import FinishEvent, PromptEvent, TokenEvent, TokenLogprobs
from tests.api.conftest import SPEECH, TOKENIZER, Server, chunks_of, encode, running, speaking
from tests.api.test_generation import STREAM
from tests.fakes import LIMITS, FakeRunner, scripted

pytestmark = pytest.mark.api

SPEECH_IDS = encode(SPEECH)
PEAK = 8.0
# A FakeRunner's logits are PEAK at one token and 0 at all others.
BEST = PEAK - math.log(math.exp(PEAK) + LIMITS.vocab_size - 1)
OTHER = BEST - PEAK


def logprobs_of(answer: dict[str, Any], index: int = 0) -> dict[str, Any]:
    logprobs: dict[str, Any] = answer["choices"][index]["logprobs"]
    assert len({len(entries) for entries in logprobs.values()}) == 1, "lists of different lengths"
    return logprobs


def joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {key: [entry for piece in pieces for entry in piece[key]] for key in keys}


def test_every_list_is_filled() -> None:
    with running(speaking(SPEECH, peak=PEAK)) as server:
        found = logprobs_of(server.post(max_tokens=2, logprobs=2).json())
    assert found["tokens"] == [" score", " and"]
    assert found["token_logprobs"] == pytest.approx([BEST, BEST], abs=1e-4)
    assert [list(top) for top in found["top_logprobs"]] == [[" score", "!"], [" and", "!"]]
    assert [list(top.values()) for top in found["top_logprobs"]] == [
        pytest.approx([BEST, OTHER], abs=1e-4)
    ] * 2
    assert found["text_offset"] == [0, 6]


def test_0_tells_of_the_chosen_token_alone(server: Server) -> None:
    found = logprobs_of(server.post(max_tokens=1, logprobs=0).json())
    assert found["top_logprobs"] == [{" score": found["token_logprobs"][0]}]


def test_a_chosen_token_is_among_the_alternatives_though_it_is_none_of_the_best() -> None:
    with running(FakeRunner(next_token=lambda _: 7, peak=PEAK)) as server:
        asked = {"logit_bias": {"7": -100, "9": 50}, "max_tokens": 1, "logprobs": 1}
        found = logprobs_of(server.post(**asked).json())
    best, chosen = TOKENIZER.decode([7]), TOKENIZER.decode([9])
    assert found["tokens"] == [chosen]
    assert found["top_logprobs"] == [
        {best: pytest.approx(BEST, abs=1e-4), chosen: pytest.approx(OTHER, abs=1e-4)}
    ]
    assert found["token_logprobs"] == [found["top_logprobs"][0][chosen]]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_has_the_prompts_too(server: Server, max_tokens: int) -> None:
    prompt = SPEECH_IDS[:3]
    [choice] = server.post(prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=1).json()[
        "choices"
    ]
    found = choice["logprobs"]
    assert found["tokens"] == [TOKENIZER.decode([i]) for i in SPEECH_IDS[: 3 + max_tokens]]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert all(logprob == pytest.approx(0) for logprob in found["token_logprobs"][1:])
    assert choice["text"] == "".join(found["tokens"])
    assert_aligned(choice)


def test_a_prompt_whose_head_is_in_the_cache_has_them_all() -> None:
    prompt = SPEECH_IDS[:9]
    with running(speaking(SPEECH, peak=PEAK)) as server:
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1}
        first, second = (server.post(**asked).json() for _ in range(2))
    assert logprobs_of(first) == logprobs_of(second)
    assert logprobs_of(first)["token_logprobs"][1:] == pytest.approx([BEST] * 9, abs=1e-4)


def assert_aligned(choice: dict[str, Any]) -> None:
    """Each token's text stands where its offset says, as far as the text goes."""
    found = choice["logprobs"]
    assert found["text_offset"] == sorted(found["text_offset"])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert token.startswith(choice["text"][offset : offset + len(token)])


def test_what_a_stop_string_cuts_off_has_none(server: Server) -> None:
    [choice] = server.post(max_tokens=8, logprobs=0, stop="ven y").json()["choices"]
    assert choice["text"] == " score and se"
    assert choice["logprobs"]["tokens"] == [" score", " and", " seven"]  # the last one in part
    assert_aligned(choice)


def test_the_end_of_the_text_has_one_like_any_token(server: Server) -> None:
    [choice] = server.post(prompt=SPEECH, logprobs=0).json()["choices"]
    assert choice["text"] == ""
    assert choice["logprobs"]["tokens"] == ["<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == [0]


def test_parts_of_a_character_are_told_as_bytes() -> None:
    ids = encode("a😀b")
    with running(speaking("a😀b")) as server:
        [choice] = server.post(prompt="a", max_tokens=len(ids) - 1, logprobs=0).json()["choices"]
    parts = [TOKENIZER.token_bytes(i) for i in ids[1:-1]]
    assert len(parts) > 1
    assert choice["text"] == "😀b"
    assert choice["logprobs"]["tokens"] == [*map(token_text, parts), "b"]
    assert choice["logprobs"]["tokens"][0] == "bytes:" + "".join(f"\\x{b:02x}" for b in parts[0])
    assert choice["logprobs"]["text_offset"] == [0] * len(parts) + [1]


def test_a_token_behind_half_a_character_begins_behind_it() -> None:
    half, word = 171, encode(" Frederick")
    line = [0, half, *word, half]
    with running(FakeRunner(next_token=scripted(TOKENIZER.eos_token_id, line))) as server:
        [echo] = server.post(prompt=line, max_tokens=0, echo=True, logprobs=0).json()["choices"]
        [whole] = server.post(prompt=[0], max_tokens=3, logprobs=0).json()["choices"]
        [cut] = server.post(prompt=[0], stop=" Fred", logprobs=0).json()["choices"]
    assert (echo["text"], echo["logprobs"]["text_offset"]) == (
        "!\ufffd Frederick\ufffd", [0, 1, 2, 12]
    )  # fmt: skip
    assert (whole["text"], whole["logprobs"]["text_offset"]) == (
        "\ufffd Frederick\ufffd", [0, 1, 11]
    )  # fmt: skip
    assert (cut["text"], cut["logprobs"]["text_offset"]) == ("\ufffd", [0])


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"stop": " seven"},
        {"echo": True, "prompt": "Four score"},
        {"echo": True, "stop": "n y", "prompt": ["Four", "Four score"], "n": 2},
        {"prompt": SPEECH},
        {"echo": True, "max_tokens": 0},
    ],
)
def test_a_stream_tells_the_same(server: Server, asked: dict[str, Any]) -> None:
    asked = {"max_tokens": 6, "logprobs": 2, **asked}
    whole = server.post(**asked).json()["choices"]
    chunks = [chunk["choices"][0] for chunk in server.stream(**asked)]
    for choice in whole:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert joined([chunk["logprobs"] for chunk in own]) == choice["logprobs"]
        assert_aligned(choice)


def test_chat_has_them_in_its_own_form() -> None:
    prompt = "User: hi\nAssistant:"
    with running(speaking(f"{prompt} 😀", peak=PEAK)) as server:
        answer = server.chat("hi", max_tokens=1, logprobs=True, top_logprobs=1).json()
        plain = server.chat("hi", max_tokens=1, logprobs=True).json()
    [entry] = answer["choices"][0]["logprobs"]["content"]
    token = TOKENIZER.token_bytes(encode(" 😀")[0])
    assert entry == {
        "token": token_text(token),
        "logprob": pytest.approx(BEST, abs=1e-4),
        "bytes": list(token),
        "top_logprobs": [{key: entry[key] for key in ("token", "logprob", "bytes")}],
    }
    assert answer["choices"][0]["logprobs"]["refusal"] is None
    assert plain["choices"][0]["logprobs"]["content"] == [{**entry, "top_logprobs": []}]


def test_a_chats_stream_tells_the_same() -> None:
    with running(speaking("User: hi\nAssistant: good day\nUser: bye")) as server:
        asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
        [whole] = server.chat("hi", **asked).json()["choices"]
        chunks = chunks_of(server.chat("hi", stream=True, **asked))
    content = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert content == whole["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [" good", " day"]


def test_impossible_tokens_are_still_json() -> None:
    made = Choice(0, [1], STREAM, TOKENIZER, Wanted(logprobs=True))
    made.accept(TokenEvent(7, logprobs=TokenLogprobs(-math.inf, ((9, 0.0), (7, -math.inf)))))
    made.accept(FinishEvent("length", 1, 1))
    found = completion_logprobs(made.take().scored, TOKENIZER)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["token_logprobs"] == [-9999.0]


@settings(deadline=None)
@given(
    prompt=st.text("ab 😀é", min_size=1, max_size=8),
    text=st.text("ab 😀é", max_size=20),
    stop=st.lists(st.text("ab 😀é", min_size=1, max_size=3), max_size=2),
    echo=st.booleans(),
    data=st.data(),
)
def test_tokens_and_text_end_together(
    prompt: str, text: str, stop: list[str], echo: bool, data: st.DataObject
) -> None:
    """However the pieces are taken: each piece's tokens begin before the text so far ends."""
    prompt_ids, ids = encode(prompt), encode(text)
    made = Choice(0, prompt_ids, STREAM, TOKENIZER, Wanted(stop, echo=echo, logprobs=True))
    if echo:
        made.accept(PromptEvent((None, *[TokenLogprobs(-1.0)] * (len(prompt_ids) - 1))))
    pieces = []
    for token_id in ids:
        made.accept(TokenEvent(token_id, logprobs=TokenLogprobs(-1.0)))
        if data.draw(st.booleans()):
            pieces.append(made.take())
    made.accept(FinishEvent("length", len(prompt_ids), len(ids)))
    pieces.append(made.take())
    whole = "".join(piece.text for piece in pieces)
    length = 0
    for piece in pieces[:-1]:
        length += len(piece.text)
        assert all(token.text_offset < length for token in piece.scored)
    scored = [token for piece in pieces for token in piece.scored]
    told = [token.token_id for token in scored]
    expected = [*(prompt_ids if echo else ()), *ids]
    assert told == expected[: len(told)]
    assert all(a.text_offset <= b.text_offset for a, b in pairwise(scored))
    assert TOKENIZER.decode(told).startswith(whole)
    if made.finish_reason == "length":
        assert told == expected
    elif scored:
        assert scored[-1].text_offset < len(whole)
