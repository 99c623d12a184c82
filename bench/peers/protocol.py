"""What an engine must offer, and the worker's side of the wire. Standard library only.

Requests and replies are JSON objects, one a line: {"op": name, …} in, {"ok": …},
{"missing": why} or {"error": traceback} out.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TextIO


@dataclass(frozen=True)
class Load:
    """How to load: `max_requests` at once, each of up to `max_context` tokens, on `threads`.

    model: what the engine's `prepare` returned. options: the engine's own.
    """

    model: Path
    threads: int
    max_requests: int
    max_context: int
    options: Mapping[str, str]


@dataclass(frozen=True)
class Generated:
    """Seconds from the start to the first token of any request, and to the last of all.

    tokens: (requests, new_tokens).
    """

    first_seconds: float
    seconds: float
    tokens: list[list[int]]


class Engine(Protocol):
    """A loaded model. Greedy, f32, and blind to the end-of-text token."""

    settings: dict[str, Any]  # what to know of how it runs, for the report

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Generated: ...

    def next_token(self, prompt: list[int]) -> dict[int, float]:
        """Log-probabilities of the next token: of all ids, or those that the engine tells."""

    def close(self) -> None: ...


class EngineModule(Protocol):
    """A module of bench.peers.engines. Importing it must not import the engine."""

    PACKAGES: tuple[str, ...]  # distributions whose versions are reported; the first is the engine
    # A function `environment`, if there is one, gives what the process must be started with.

    def prepare(self, folder: Path, cache: Path) -> Path:
        """Convert the Hugging Face folder into the engine's own format; reuse what is there."""

    def load(self, load: Load) -> Engine: ...


class Worker:
    """Answers requests about one engine until it is told to stop, or nobody asks any more."""

    def __init__(self, module: EngineModule) -> None:
        self._module = module
        self._engine: Engine | None = None

    def serve(self, requests: TextIO, replies: TextIO) -> None:
        for line in requests:
            request = json.loads(line)
            operation = request.pop("op")
            replies.write(json.dumps(self._reply(operation, request)) + "\n")
            replies.flush()
            if operation == "stop":
                return

    def _reply(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        operations: dict[str, Callable[..., Any]] = {
            "hello": self._hello,
            "prepare": self._prepare,
            "load": self._load,
            "generate": self._generate,
            "next_token": self._next_token,
            "memory": memory,
            "stop": self._stop,
        }
        try:
            return {"ok": operations[operation](**request)}
        except metadata.PackageNotFoundError as error:
            return {"missing": f"package {error.name}"}
        except ModuleNotFoundError as error:
            return {"missing": f"module {error.name}"}
        except Exception:
            return {"error": traceback.format_exc()}

    def _hello(self) -> dict[str, str]:
        """Versions; the engine itself must be there."""
        engine, *others = self._module.PACKAGES
        return {engine: metadata.version(engine)} | {name: _version(name) for name in others}

    def _prepare(self, folder: str, cache: str) -> str:
        return str(self._module.prepare(Path(folder), Path(cache)))

    def _load(self, model: str, **load: Any) -> dict[str, Any]:
        self._engine = self._module.load(Load(Path(model), **load))
        return self._engine.settings

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        return asdict(self._loaded.generate(prompts, new_tokens))

    def _next_token(self, prompt: list[int]) -> list[tuple[int, float]]:
        return list(self._loaded.next_token(prompt).items())

    def _stop(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @property
    def _loaded(self) -> Engine:
        assert self._engine is not None, "load first"
        return self._engine


def memory() -> dict[str, int]:
    """Bytes of this process that are in memory, now and at the most. Linux only."""
    names = {"VmHWM": "peak_rss_bytes", "VmRSS": "rss_bytes"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
