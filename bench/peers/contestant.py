"""One engine on one model: its worker, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.jobs import Job, Metric, Prompts
from bench.peers.process import NotInstalledError, WorkerError, WorkerProcess
from bench.peers.report import Answer, rates

Times = tuple[float, float]  # seconds to the first token, and to the last


@dataclass
class Contestant:
    """Never raises what its engine does wrong: it is out then, and `error` says why.

    module: of bench.peers.engines. options: the engine's own.
    """

    name: str
    module: str
    python: str
    threads: int
    timeout: float
    logs: Path
    options: Mapping[str, str] = field(default_factory=dict)
    state: str = "measured"
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=lambda: {"agrees": None})
    times: dict[Job, list[Times]] = field(default_factory=dict)
    model: str | None = None
    told: bool = False  # the driver has said what went wrong
    _worker: WorkerProcess | None = None

    def prepare(self, folder: Path, cache: Path) -> None:
        """See whether it is installed, and let it convert the weights, in a process for that."""
        try:
            with self._start() as worker:
                self.versions = worker.ask("hello", self.timeout)
                self.model = worker.ask(
                    "prepare", self.timeout, folder=str(folder), cache=str(cache)
                )
        except (NotInstalledError, WorkerError) as error:
            self._out(error)

    def load(self, phase: str, max_requests: int, max_context: int) -> None:
        """Start its worker for a phase, if nothing went wrong so far."""
        if self.model is None or self.error:
            return
        try:
            self._worker = self._start()
        except NotInstalledError as error:
            self._out(error)
        settings = self._ask(
            "load",
            model=self.model,
            threads=self.threads,
            max_requests=max_requests,
            max_context=max_context,
            options=dict(self.options),
        )
        if settings is not None:
            self.settings[phase] = settings

    def run(self, job: Job, prompts: Prompts) -> tuple[Times, Prompts] | None:
        """Seconds, and the tokens, (requests, new_tokens); None if it is out, now or before."""
        done = self._ask("generate", prompts=prompts, new_tokens=job.new_tokens)
        if done is None:
            return None
        lengths = {len(tokens) for tokens in done["tokens"]}
        if len(done["tokens"]) != job.requests or lengths != {job.new_tokens}:
            self._out(WorkerError(f"{job.name}: it gave {sorted(lengths)} tokens"))
            return None
        return (done["first_seconds"], done["seconds"]), done["tokens"]

    def answers(self, prompts: Prompts, new_tokens: int) -> list[Answer] | None:
        """What it says to each prompt: for comparing."""
        found: list[Answer] = []
        for prompt in prompts:
            told = self._ask("next_token", prompt=prompt)
            done = self.run(Job(1, len(prompt), new_tokens), [prompt])
            if told is None or done is None:
                return None
            found.append((done[1][0], {int(token): float(value) for token, value in told}))
        return found

    def measure_memory(self) -> None:
        self.memory = self._ask("memory") or self.memory

    def close(self) -> None:
        """End its worker; another phase may follow."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def result(self, metrics: tuple[Metric, ...]) -> dict[str, Any]:
        return {
            "state": self.state,
            "error": self.error,
            "versions": self.versions,
            "settings": self.settings,
            "check": self.check,
            "rates": {
                m.key: rates([m.rate(*times) for times in self.times[m.job]])
                for m in metrics
                if self.times.get(m.job)
            },
            "memory": self.memory,
        }

    def _start(self) -> WorkerProcess:
        log = self.logs / f"{self.name}.log"
        return WorkerProcess(self.module, self.python, self.threads, log)

    def _ask(self, operation: str, **request: Any) -> Any:
        if self._worker is None:
            return None
        try:
            return self._worker.ask(operation, self.timeout, **request)
        except (NotInstalledError, WorkerError) as error:
            self._out(error)
            return None

    def _out(self, error: Exception) -> None:
        self.state = "not installed" if isinstance(error, NotInstalledError) else "failed"
        self.error = str(error)
        self.close()
