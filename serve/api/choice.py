"""One of a request's choices while it is generated: events in, text out.

Knows no endpoint, no JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from serve.engine import Event, FinishEvent, PromptEvent, Stream, TokenEvent, TokenLogprobs
from serve.errors import EngineError
from serve.stops import StopChecker
from serve.tokenizer import Tokenizer


@dataclass(frozen=True)
class Wanted:
    """What the client wants of every choice.

    stop: strings in front of which the text ends. min_tokens: no stop string in the text of so
    many. echo: the text begins with the prompt's. token_ids: a token is news even where it makes no
    text certain yet. logprobs: those of every token; the engine has to be asked for them, too.
    """

    stop: Sequence[str] = ()
    min_tokens: int = 0
    echo: bool = False
    token_ids: bool = False
    logprobs: bool = False


class ScoredToken(NamedTuple):
    """A token and where it begins, in characters of the choice's text.

    `logprobs` is None for a prompt's first token alone.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    text_offset: int


class Piece(NamedTuple):
    """A choice's news. The scored tokens are those whose text has begun in it, or before."""

    text: str
    token_ids: list[int]
    scored: list[ScoredToken]


class Choice:
    """One sequence on its way to the client.

    `finish_reason` is there once the text is complete; `result`, the engine's last event, may come
    a step later. `num_generated` counts the tokens up to the end of the text. `sample`: which of
    the prompt's choices it is.
    """

    def __init__(
        self,
        index: int,
        prompt_ids: Sequence[int],
        stream: Stream,
        tokenizer: Tokenizer,
        wanted: Wanted,
        sample: int = 0,
    ) -> None:
        self.index, self.prompt_ids, self.stream, self.sample = index, prompt_ids, stream, sample
        self.num_generated = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self.result: FinishEvent | None = None
        self.is_begun = False  # something of it was taken
        self._is_told = False  # its end was taken
        self._tokenizer, self._wanted = tokenizer, wanted
        self._detokenizer, self._stops = tokenizer.detokenizer(), StopChecker(wanted.stop)
        self._text = [tokenizer.decode(prompt_ids)] if wanted.echo else []
        self._ids: list[int] = []
        self._scored: list[ScoredToken] = []
        self._sum_logprobs = 0.0
        # Characters of the text that are sure to be sent, and with those that a stop string may
        # yet take away.
        self._num_sure = self._num_certain = sum(map(len, self._text))

    def accept(self, event: Event) -> None:
        """Raises the error with which the sequence ended, unless its text was complete before."""
        if isinstance(event, TokenEvent):
            if self.finish_reason is None:
                self._extend(event)
        elif isinstance(event, FinishEvent):
            self._finish(event)
        else:
            self._score_prompt(event)

    @property
    def has_news(self) -> bool:
        if self._text or (self._ids and self._wanted.token_ids):
            return True
        return self.result is not None and not self._is_told

    def take(self) -> Piece:
        """What is new since the last time."""
        piece = Piece("".join(self._text), self._ids, self._take_scored() if self._scored else [])
        self._text, self._ids = [], []
        self.is_begun, self._is_told = True, self.result is not None
        return piece

    @property
    def mean_logprob(self) -> float:
        """Of the generated tokens, by the model's own probabilities; -inf of none."""
        return self._sum_logprobs / self.num_generated if self.num_generated else float("-inf")

    def cancel(self, reason: Literal["cancelled", "timeout"] = "cancelled") -> None:
        if self.result is None:
            self.stream.cancel(reason)

    def _extend(self, event: TokenEvent) -> None:
        self._ids.append(event.token_id)
        self.num_generated += 1
        if event.logprobs is not None:
            self._score(event.token_id, event.logprobs, event.is_stop)
        if not event.is_stop:
            self._add(self._detokenizer.push(event.token_id))

    def _score(self, token_id: int, logprobs: TokenLogprobs, is_stop: bool) -> None:
        self._sum_logprobs += logprobs.logprob
        if self._wanted.logprobs:
            before = 0 if is_stop else self._detokenizer.num_before(token_id)
            self._scored.append(ScoredToken(token_id, logprobs, self._num_certain + before))

    def _score_prompt(self, event: PromptEvent) -> None:
        detokenizer, offset = self._tokenizer.detokenizer(skip_special=False), 0
        for token_id, logprobs in zip(self.prompt_ids, event.logprobs, strict=True):
            before = detokenizer.num_before(token_id)
            self._scored.append(ScoredToken(token_id, logprobs, offset + before))
            offset += len(detokenizer.push(token_id))

    def _take_scored(self) -> list[ScoredToken]:
        """A token goes with its text: it waits while that does, and is cut off with it."""
        scored, self._scored = self._scored, []
        if self.result is not None and self._stops.matched is None:
            return scored
        sure = [token for token in scored if token.text_offset < self._num_sure]
        if self.finish_reason is None:
            self._scored = scored[len(sure) :]
        return sure

    def _add(self, text: str) -> None:
        self._num_certain += len(text)
        if self.num_generated > self._wanted.min_tokens:  # no stop string before so many, either
            text, is_hit = self._stops.push(text)
            if is_hit:
                self.finish_reason = "stop"
                self.stream.stop(self.num_generated)
        self._send(text)

    def _send(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._num_sure += len(text)

    def _finish(self, event: FinishEvent) -> None:
        self.result = event
        if self.finish_reason is not None:
            return
        if event.error is not None:
            raise event.error
        if event.reason not in ("stop", "length"):
            raise EngineError("The server ended this request before it was complete")
        self._add(self._detokenizer.finish())
        if self.finish_reason is None:
            self.finish_reason = event.reason
            self._send(self._stops.finish())
