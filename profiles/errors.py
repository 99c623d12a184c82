"""The error of this package. The server shows it as it is."""

from __future__ import annotations

from collections.abc import Iterable


class ProfileError(ValueError):
    """A profile is wrong: names the file, the key and what is known or expected."""

    def __init__(self, source: str, key: str, problem: str, known: Iterable[object] = ()) -> None:
        choices = ", ".join(str(name) for name in known)
        super().__init__(f"{source}: {key}: {problem}" + (f"; known: {choices}" if choices else ""))
        self.source, self.key, self.problem, self.known = source, key, problem, tuple(known)
