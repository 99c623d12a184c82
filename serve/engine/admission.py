"""Who may come in: checks a submission, bounds the queue, and says when to try again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from serve.engine.runner import RunnerLimits
from serve.engine.sequence import SamplingParams
from serve.engine.stats import Gauges, StepStats, ThroughputWindow
from serve.errors import ContextLengthError, EngineError, OverloadedError, RequestError

_LONGEST_RETRY = 600.0  # seconds


class Admission:
    """The count of an engine's unfinished sequences, and the rules for one more.

    Lives where clients submit: in the engine's process or in front of it. Hold `lock` around
    enter() and the submission's dispatch, so that none slips past fail() or close().
    """

    def __init__(
        self,
        limits: RunnerLimits,
        max_unfinished: int,
        max_waiting_tokens: int,
        gauges: Callable[[], Gauges],
    ) -> None:
        """`gauges`: the engine's, after its last step."""
        self.lock = threading.Lock()
        self.error: BaseException | None = None  # of which the engine died
        self.is_open = True
        self.num_unfinished = 0
        self._limits, self._gauges = limits, gauges
        self._max_unfinished, self._max_waiting_tokens = max_unfinished, max_waiting_tokens
        self._num_entered_tokens = 0  # of prompts, in all
        self._num_entered_completion_tokens = 0  # to be generated from them, at most
        self._windows = {"prefill": ThroughputWindow(), "decode": ThroughputWindow()}

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises RequestError, ContextLengthError for what can never be computed."""
        if not prompt_ids:
            raise RequestError("The prompt is empty: give at least one token", param="prompt")
        vocab_size = self._limits.vocab_size
        for param, token_ids in (("prompt", prompt_ids), ("logit_bias", params.logit_bias)):
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(
                        f"Token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})",
                        param,
                    )
        if params.max_tokens < 0:
            raise RequestError(f"max_tokens is {params.max_tokens}; at least 0", param="max_tokens")
        if len(prompt_ids) + params.max_tokens > self._limits.max_context:
            raise ContextLengthError(len(prompt_ids), params.max_tokens, self._limits.max_context)

    def enter(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Count one more sequence. Raises as check_room."""
        self.check_room(1, num_prompt_tokens)
        self.num_unfinished += 1
        self._num_entered_tokens += num_prompt_tokens
        self._num_entered_completion_tokens += max_tokens

    def check_room(self, num_sequences: int, num_prompt_tokens: int) -> None:
        """Whether a request's sequences may all come in, with so many prompt tokens in all.

        Raises OverloadedError, RequestError if they never could, and EngineError if closed or dead.
        """
        if num_sequences > self._max_unfinished:
            raise RequestError(
                f"The request asks for {num_sequences} sequences; this server runs and queues "
                f"{self._max_unfinished} at most",
                "n",
                "too_many_sequences",
            )
        if self.error is not None:
            raise EngineError("The engine has failed and takes no more requests", "engine_dead")
        if not self.is_open:
            raise EngineError("The server is shutting down and takes no more requests", "draining")
        if self.num_unfinished + num_sequences > self._max_unfinished:
            raise OverloadedError(
                f"{self.num_unfinished} sequences are queued or running; with this request's "
                f"{num_sequences} it would be over {self._max_unfinished}; try again later",
                self._seconds_to_wait(),
                "queue_full",
            )
        waiting = self.num_waiting_tokens
        if waiting and waiting + num_prompt_tokens > self._max_waiting_tokens:
            raise OverloadedError(
                f"{waiting} prompt tokens are queued; with {num_prompt_tokens} more it would be "
                f"over {self._max_waiting_tokens}; try again later",
                self._seconds_to_wait(),
                "queue_tokens",
            )

    def leave(self) -> None:
        """A sequence has ended."""
        with self.lock:
            self.num_unfinished -= 1

    def close(self) -> None:
        with self.lock:
            self.is_open = False

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self.error = error

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of the queue, those that the engine has not seen yet included."""
        gauges = self._gauges()
        unseen = self._num_entered_tokens - gauges.num_entered_tokens
        return gauges.num_waiting_tokens + max(0, unseen)

    def on_step(self, stats: StepStats) -> None:
        self._windows[stats.phase].add(stats.num_tokens, stats.seconds)

    def _seconds_to_wait(self) -> float:
        """Until the queue of this moment is worked off, at the throughput of the last seconds.

        So until its last sequence begins; if nobody waits, until those end that run. All are taken
        to generate as much as they may. 1 while nothing has been measured.
        """
        work = {"prefill": self.num_waiting_tokens, "decode": self._num_decoded_before()}
        rates = {phase: window.tokens_per_second() for phase, window in self._windows.items()}
        seconds = sum(work[phase] / rate for phase, rate in rates.items() if rate)
        return min(max(1.0, seconds), _LONGEST_RETRY)

    def _num_decoded_before(self) -> float:
        """Tokens to decode before the last of the queue begins.

        It then has all of its own to come; those beside it, on the average, half of theirs.
        """
        gauges = self._gauges()
        unseen = self._num_entered_completion_tokens - gauges.num_entered_completion_tokens
        num_waiting = max(0, self.num_unfinished - gauges.num_running)
        waiting = gauges.num_waiting_completion_tokens + max(0, unseen)
        waiting = max(0, waiting - num_waiting)  # the first token of each comes with its prompt
        side_by_side = max(1, min(gauges.num_running, num_waiting))
        tail = waiting / max(1, num_waiting) * (1 + (side_by_side - 1) / 2)
        return gauges.num_running_completion_tokens + waiting - tail
