"""Continuous batching over a ModelRunner. Speaks token ids; knows nothing of TVM, text or HTTP."""

from serve.engine.constraint import Constrain, Constraint
from serve.engine.engine import Engine, EngineConfig
from serve.engine.runner import Chunk, Logits, ModelRunner, Row, RunnerLimits
from serve.engine.sequence import (
    Event,
    FinishEvent,
    FinishReason,
    PromptEvent,
    SamplingParams,
    Timings,
    TokenEvent,
    TokenLogprobs,
)
from serve.engine.stats import EngineObserver, Gauges, NullObserver, StepStats, ThroughputWindow
from serve.engine.stream import Stream

__all__ = [
    "Chunk",
    "Constrain",
    "Constraint",
    "Engine",
    "EngineConfig",
    "EngineObserver",
    "Event",
    "FinishEvent",
    "FinishReason",
    "Gauges",
    "Logits",
    "ModelRunner",
    "NullObserver",
    "PromptEvent",
    "Row",
    "RunnerLimits",
    "SamplingParams",
    "StepStats",
    "Stream",
    "ThroughputWindow",
    "Timings",
    "TokenEvent",
    "TokenLogprobs",
]
