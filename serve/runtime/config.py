"""How much a runner holds; imports no TVM, as settings do not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunnerConfig:
    """How much a runner holds.

    max_batch: sequences in one step. max_step_tokens: prompt tokens in one step. kv_tokens:
    positions in the KV cache over all sequences; None: the context of 8 sequences. threads: None is
    every CPU that the process may use. What the KV cache cannot hold is not computed in one step.
    """

    max_batch: int = 32
    max_step_tokens: int = 512
    kv_tokens: int | None = None
    threads: int | None = None

    def kv_tokens_for(self, max_context: int) -> int:
        """Positions in the KV cache of a model with so many in a sequence."""
        return self.kv_tokens or 8 * max_context

    def step_tokens_for(self, max_context: int) -> int:
        """Tokens in a step of that model, at most."""
        return min(max(self.max_step_tokens, self.max_batch), self.kv_tokens_for(max_context))
