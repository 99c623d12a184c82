"""From a step's logits to a sequence's next tokens, and to the log-probabilities of its prompt.

Pure: writes to the sequence alone. Whatever it raises concerns that sequence only.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from serve.engine.logprobs import log_probabilities
from serve.engine.runner import Logits, Row
from serve.engine.sampler import choose
from serve.engine.sequence import Sequence, TokenEvent


def read_prompt(sequence: Sequence, rows: Logits) -> None:
    """Add to `prompt_logprobs` what the rows say about the prompt's tokens that follow them.

    `rows`: after each of the last tokens computed, (tokens, vocab). What is known already (before a
    preemption) is not computed again. Raises ValueError for a row that holds no distribution.
    """
    known, asked = sequence.prompt_logprobs, sequence.params.num_prompt_logprobs
    assert known is not None
    assert asked is not None
    first = sequence.num_computed - len(rows)  # the index of the token that rows[0] comes after
    following = sequence.prompt_ids[len(known) :]
    for token_id, row in zip(following, rows[len(known) - 1 - first :], strict=False):
        known.append(log_probabilities(row, token_id, asked))


def generate(sequence: Sequence, rows: Logits, draft: Seq[int], events: list[TokenEvent]) -> None:
    """Append the tokens that come next, to the sequence and to `events`.

    One, and another one for each guess of the `draft` that was right, each chosen as without a
    draft. `rows`: the logits after the sequence's newest token and after each of the draft's,
    (1 + len(draft), vocab). Raises ValueError for a row that allows no token; those of the rows
    before it are there.
    """
    for row, guess in zip(rows, (*draft, None), strict=True):
        events.append(_next(sequence, row))
        if events[-1].token_id != guess or sequence.finish_reason() is not None:
            break


def _next(sequence: Sequence, row: Row) -> TokenEvent:
    token_id = choose(row, sequence)
    if token_id is None:
        raise ValueError("no token can be chosen from the logits")
    asked = sequence.params.num_logprobs
    logprobs = None if asked is None else log_probabilities(row, token_id, asked)
    sequence.append(token_id)
    return TokenEvent(token_id, sequence.newest_is_stop(), logprobs)
