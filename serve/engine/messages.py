"""What the engines' process and the one in front of it say to each other. All of it is pickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.engine.engine import EngineConfig
from serve.engine.runner import RunnerLimits
from serve.engine.sequence import EarlyEnd, Event, SamplingParams
from serve.engine.stats import Gauges

# -- to the engines; `key` names one of them, `number` a sequence of it


@dataclass(frozen=True)
class Load:
    """Make an engine. `request`: what the host's `prepare` takes."""

    key: str
    request: Any


@dataclass(frozen=True)
class Unload:
    """Give its sequences so many seconds, cancel the rest, and forget it."""

    key: str
    seconds: float


@dataclass(frozen=True)
class Hasten:
    """Give the sequences of one that is being unloaded so many seconds, unless it has fewer."""

    key: str
    seconds: float


@dataclass(frozen=True)
class Submit:
    key: str
    number: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    share_key: str | None


@dataclass(frozen=True)
class End:
    key: str
    number: int
    reason: EarlyEnd
    num_generated: int | None


# -- from the engines


@dataclass(frozen=True)
class Progress:
    """A load has come to this phase."""

    key: str
    phase: str


@dataclass(frozen=True)
class Loaded:
    """The engine runs. `about`: what the host's `prepare` says of it."""

    key: str
    limits: RunnerLimits
    config: EngineConfig
    about: Any


@dataclass(frozen=True)
class LoadFailed:
    key: str
    message: str


@dataclass(frozen=True)
class Unloaded:
    key: str


@dataclass(frozen=True)
class Step:
    """What an engine published. `observed`: calls of its observer's methods, in order."""

    key: str
    events: Sequence[tuple[int, Event]]
    observed: Sequence[tuple[str, tuple[Any, ...]]]
    gauges: Gauges


@dataclass(frozen=True)
class Pulse:
    """The process lives. `busy`: for how many seconds each engine has been in its step."""

    busy: Mapping[str, float]
    dead: Sequence[str]  # engines whose thread has ended
