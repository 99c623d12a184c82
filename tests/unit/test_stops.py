"""The stop checker against a brute-force definition, however the text is split."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import RequestError
from serve.stops import StopChecker

pytestmark = pytest.mark.unit

# Few letters, so that partial, overlapping and nested matches are common.
LETTERS = st.text("ab", max_size=40)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


def cut_by_definition(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Text before the stop string complete first (the longest, of several), and that string."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    checker = StopChecker(stop)
    sent = ""
    for piece in pieces:
        new, hit = checker.push(piece)
        sent += new
        assert hit == (checker.matched is not None)
    return sent + checker.finish(), checker.matched


@st.composite
def splits(draw: st.DrawFn, texts: st.SearchStrategy[str] = LETTERS) -> list[str]:
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


@settings(deadline=None)
@given(splits(), STOPS)
def test_any_split_gives_the_text_cut_by_definition(pieces: list[str], stop: list[str]) -> None:
    assert run(pieces, stop) == cut_by_definition("".join(pieces), stop)


@settings(deadline=None)
@given(st.data(), st.text("abc", min_size=1, max_size=12))
def test_text_made_of_a_stop_strings_beginnings(data: st.DataObject, string: str) -> None:
    """The hardest text for the matching: every piece almost is the stop string."""
    beginnings = st.sampled_from([string[:end] for end in range(1, len(string) + 1)])
    pieces = data.draw(st.lists(beginnings, max_size=8))
    assert run(pieces, [string]) == cut_by_definition("".join(pieces), [string])


def test_every_short_text_and_stop_string() -> None:
    words = [
        "".join(letters) for num in range(1, 8) for letters in itertools.product("ab", repeat=num)
    ]
    for stop, text in itertools.product(words, words):
        before, found, _ = text.partition(stop)
        assert run([text], [stop]) == (before, found or None)


@settings(deadline=None)
@given(splits(st.text(max_size=20)), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_any_unicode_text(pieces: list[str], stop: list[str]) -> None:
    assert run(pieces, stop) == cut_by_definition("".join(pieces), stop)


@settings(deadline=None)
@given(LETTERS, STOPS)
def test_one_character_at_a_time_is_the_same_as_all_at_once(text: str, stop: list[str]) -> None:
    assert run(list(text), stop) == run([text], stop)


@settings(deadline=None)
@given(splits(), STOPS)
def test_no_more_is_held_back_than_could_begin_a_stop_string(
    pieces: list[str], stop: list[str]
) -> None:
    checker, sent, pushed = StopChecker(stop), "", ""
    for piece in pieces:
        new, hit = checker.push(piece)
        sent, pushed = sent + new, pushed + piece
        if hit:
            break
        held = pushed[len(sent) :]
        assert pushed.startswith(sent)
        assert not held or any(s.startswith(held) and s != held for s in stop)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("ENDEND", ["END"], ""),
        ("one EN", ["END"], "one EN"),
        ("xabcd", ["abcd", "bc"], "xa"),  # complete first wins, though "abcd" begins earlier
        ("xabc", ["bc", "abc", "c"], "x"),  # complete together: the longest wins
        ("aaab", ["aab"], "a"),
        ("aabaaabaaac!", ["aabaaac"], "aaba"),  # falls back twice, to a beginning of a beginning
        ("abaabab", ["abab"], "aba"),
        ("é\U0001f600\n\n!", ["\n\n"], "é\U0001f600"),
        ("text", [], "text"),
        ("text", ["t", "t"], ""),
    ],
)
def test_examples(text: str, stop: list[str], expected: str) -> None:
    assert run(list(text), stop)[0] == expected
    assert run([text], stop)[0] == expected


def test_text_is_sent_as_soon_as_it_cannot_be_a_stop_string() -> None:
    checker = StopChecker(["END"])
    assert checker.push("a E") == ("a ", False)
    assert checker.push("N") == ("", False)
    assert checker.push("E") == ("EN", False)
    assert checker.push("ND!") == ("", True)
    assert checker.matched == "END"


def test_nothing_follows_a_stop_string() -> None:
    checker = StopChecker(["."])
    assert checker.push("a.b") == ("a", True)
    assert checker.push("c") == ("", True)
    assert checker.finish() == ""


def test_a_long_stop_string_that_keeps_almost_matching() -> None:
    stop = "a" * 2000 + "b"
    assert run(["a" * 50] * 400, [stop]) == ("a" * 20_000, None)
    assert run(["a" * 50] * 400 + ["b"], [stop]) == ("a" * 18_000, stop)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty") as caught:
        StopChecker(["a", ""])
    assert caught.value.param == "stop"
