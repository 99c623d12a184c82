"""What a sequence's text must match, as the engine sees it: which tokens may come next.

serve/grammar.py has the real one; tests/fakes.py has the tests'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from serve.engine.runner import Row


class Constraint(Protocol):
    """The state of one sequence in its grammar. What it raises ends that sequence alone."""

    @property
    def is_over(self) -> bool:
        """Whether the end-of-text token has been accepted: the text is whole."""

    def mask(self, row: Row) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place.

        Where the text is whole, the end-of-text token is among those that may.
        """

    def accept(self, token_id: int) -> None:
        """Go on by one token, which mask() allowed."""

    def allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these may come next, one after the other; the state stays as it is."""


# A grammar's text, as serve/grammar.py writes it -> a constraint at its beginning. Called in the
# threads that submit. Raises RequestError.
Constrain = Callable[[str], Constraint]
