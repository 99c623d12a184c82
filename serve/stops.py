"""Cut a stream of text at its first stop string. Knows nothing of tokens, the engine or HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from serve.errors import RequestError


class StopChecker:
    """Passes text on, but holds back what may yet turn out to be the beginning of a stop string.

    The stop string that is complete first wins; of several complete at the same character, the
    longest (the one that begins first). The text ends right before it. However the text is split
    into pushes, the pieces that come out join to the same text. A push costs time in proportion to
    its own text and what is held back (Knuth, Morris and Pratt's matching), not to all the text.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise RequestError("A stop string must not be empty.", param="stop")
        self._matchers = [_Matcher(string) for string in dict.fromkeys(stop)]
        self._beginnings = frozenset(string[0] for string in stop)
        self._held = ""  # always the longest end of the text that begins a stop string
        self.matched: str | None = None  # the stop string that was hit

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be sent now; whether a stop string was hit: then nothing follows."""
        if self.matched is not None:
            return "", True
        if not self._held and self._beginnings.isdisjoint(text):
            return text, False
        pending = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [m.string for m in self._matchers if m.advance(character)]
            if complete:
                self.matched, self._held = max(complete, key=len), ""
                return pending[: end - len(self.matched)], True
        sure = len(pending) - max(m.num_matched for m in self._matchers)
        self._held = pending[sure:]
        return pending[:sure], False

    def finish(self) -> str:
        """What was held back, when the sequence ends without a stop string; the last call."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """How much of one stop string the text so far ends with."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.num_matched = 0
        self._shorter = _shorter_matches(string)

    def advance(self, character: str) -> bool:
        """Take the next character of the text; whether the whole string is there now."""
        num = self.num_matched
        while num and self.string[num] != character:
            num = self._shorter[num - 1]
        self.num_matched = num + (self.string[num] == character)
        return self.num_matched == len(self.string)


def _shorter_matches(string: str) -> list[int]:
    """For each prefix (by its length less one), the length of its longest proper prefix-suffix."""
    lengths = [0]
    for character in string[1:]:
        num = lengths[-1]
        while num and string[num] != character:
            num = lengths[num - 1]
        lengths.append(num + (string[num] == character))
    return lengths
