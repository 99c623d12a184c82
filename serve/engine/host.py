"""The engines' process: its side of the connection. The other is remote.py.

Whatever ends this process, a crash in native code too, is seen in front as the connection's end.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from serve.engine import messages
from serve.engine.constraint import Constrain
from serve.engine.engine import Engine, EngineConfig
from serve.engine.runner import ModelRunner
from serve.engine.sequence import Event, FinishEvent
from serve.engine.stats import Gauges, StepStats
from serve.errors import EngineError, ServeError

log = logging.getLogger(__name__)

PULSE_SECONDS = 0.5


@dataclass(frozen=True)
class Prepared:
    """What an engine is made of. `about`: told to the front, pickled."""

    runner: ModelRunner
    config: EngineConfig
    about: Any
    constrain: Constrain | None = None


# (request, called with each phase) -> what to run
Prepare = Callable[[Any, Callable[[str], None]], Prepared]


def serve(connection: Connection, prepare: Prepare, free_memory: Callable[[], object]) -> None:
    """Do what comes in, until the other side is gone. `free_memory`: called after an unload."""
    _Host(connection, prepare, free_memory).run()


class _Host:
    """Engines by key. Loads and unloads run in threads of their own."""

    def __init__(
        self, connection: Connection, prepare: Prepare, free_memory: Callable[[], object]
    ) -> None:
        self._connection, self._prepare = connection, prepare
        self._free_memory = free_memory
        self._sending = threading.Lock()
        self._engines: dict[str, _Engine] = {}

    def run(self) -> None:
        next_pulse = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_pulse:
                self._pulse()
                next_pulse = now + PULSE_SECONDS
            try:
                if self._connection.poll(max(0.0, next_pulse - now)):
                    self._handle(self._connection.recv())
            except (EOFError, OSError):
                return

    def _handle(self, message: object) -> None:
        match message:
            case messages.Load():
                self._in_thread(self._load, message)
            case messages.Unload():
                self._in_thread(self._unload, message)
            case messages.Submit() | messages.End() | messages.Hasten():
                engine = self._engines.get(message.key)
                if engine is None:
                    log.debug("%s came after its engine's end", message)
                else:
                    engine.handle(message)

    def _in_thread(self, function: Callable[[Any], None], message: object) -> None:
        threading.Thread(target=function, args=(message,), daemon=True).start()

    def _load(self, message: messages.Load) -> None:
        key = message.key

        def report(phase: str) -> None:
            self.send(messages.Progress(key, phase))

        try:
            prepared = self._prepare(message.request, report)
        except ServeError as error:
            self.send(messages.LoadFailed(key, str(error)))
        except MemoryError as error:
            self.send(messages.LoadFailed(key, f"out of memory: {error}"))
        except Exception as error:
            log.exception("loading %s failed", key)
            self.send(messages.LoadFailed(key, f"{type(error).__name__}: {error}"))
        else:
            engine = _Engine(key, prepared, self.send)
            self._engines[key] = engine
            limits = prepared.runner.limits
            self.send(messages.Loaded(key, limits, prepared.config, prepared.about))

    def _unload(self, message: messages.Unload) -> None:
        try:
            self._engines[message.key].stop(message.seconds)
        except Exception:
            log.exception("unloading %s failed", message.key)
        del self._engines[message.key]
        gc.collect()  # an engine and what it is made of refer to each other
        self._free_memory()
        self.send(messages.Unloaded(message.key))

    def _pulse(self) -> None:
        engines = list(self._engines.values())
        busy = {engine.key: engine.busy_seconds for engine in engines}
        self.send(messages.Pulse(busy, [e.key for e in engines if not e.is_alive]))

    def send(self, message: object) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:  # nobody is left to hear it; run() will see that
            log.debug("the connection is closed")


class _Engine:
    """An engine whose events and observations go over the connection, a message a step."""

    def __init__(self, key: str, prepared: Prepared, send: Callable[[object], None]) -> None:
        self.key, self._send = key, send
        self._events: list[tuple[int, Event]] = []
        self._observed: list[tuple[str, tuple[Any, ...]]] = []
        self._told: Gauges | None = None
        self._engine = Engine(
            prepared.runner, prepared.config, self, self, constrain=prepared.constrain
        )
        self._engine.start()

    def handle(self, message: messages.Submit | messages.End | messages.Hasten) -> None:
        match message:
            case messages.Submit():
                self._submit(message)
            case messages.End():
                self._engine.end(message.number, message.reason, message.num_generated)
            case messages.Hasten():
                self._engine.hasten(message.seconds)

    def _submit(self, message: messages.Submit) -> None:
        try:
            self._engine.enqueue(
                message.prompt_ids, message.params, message.share_key, message.number
            )
        except ServeError as error:  # checked in front, so: it is draining, or has just died
            self._refuse(message, error)
        except Exception:
            log.exception("a submission failed")
            self._refuse(message, EngineError("The engine failed to take this request"))

    def _refuse(self, message: messages.Submit, error: ServeError) -> None:
        event = FinishEvent("error", len(message.prompt_ids), 0, error=error)
        gauges = self._engine.gauges()
        self._send(messages.Step(self.key, [(message.number, event)], [], gauges))

    def stop(self, seconds: float) -> None:
        asyncio.run(self._engine.drain(seconds))

    @property
    def is_alive(self) -> bool:
        return self._engine.is_alive

    @property
    def busy_seconds(self) -> float:
        return self._engine.busy_seconds

    # -- the engine's Outbox, in its thread

    def put(self, address: int, event: Event) -> None:
        self._events.append((address, event))

    def flush(self) -> None:
        gauges = self._engine.gauges()
        if self._events or self._observed or gauges != self._told:
            self._send(messages.Step(self.key, self._events, self._observed, gauges))
            self._events, self._observed, self._told = [], [], gauges

    # -- its EngineObserver, in its thread

    def on_step(self, stats: StepStats) -> None:
        self._observed.append(("on_step", (stats,)))

    def on_first_token(self, seconds: float) -> None:
        self._observed.append(("on_first_token", (seconds,)))

    def on_inter_token(self, seconds: float) -> None:
        self._observed.append(("on_inter_token", (seconds,)))

    def on_prefix_lookup(self, num_queried: int, num_hit: int) -> None:
        self._observed.append(("on_prefix_lookup", (num_queried, num_hit)))

    def on_preemption(self) -> None:
        self._observed.append(("on_preemption", ()))

    def on_speculation(self, num_drafted: int, num_accepted: int) -> None:
        self._observed.append(("on_speculation", (num_drafted, num_accepted)))

    def on_finish(self, event: FinishEvent) -> None:
        self._observed.append(("on_finish", (event,)))
