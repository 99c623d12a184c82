"""Engines in a process of their own, as the process in front sees them. The other side: host.py.

Native code that crashes or hangs takes that process down, and nothing else: its end is noticed
here, and every sequence that waits ends with an error at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from serve.engine import messages
from serve.engine.admission import Admission
from serve.engine.runner import RunnerLimits
from serve.engine.sequence import EarlyEnd, FinishEvent, SamplingParams
from serve.engine.stats import EngineObserver, Gauges
from serve.engine.stream import Stream, StreamOutbox
from serve.errors import EngineError, LoadError

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
_PATIENCE = 10.0  # seconds that a process gets to end by itself
_START_SECONDS = 60.0

OnProgress = Callable[[str], None]
MakeObserver = Callable[["RemoteEngine"], EngineObserver]


class HostProcess:
    """A process that is to run host.serve(), just started."""

    def __init__(self, command: Sequence[str]) -> None:
        """`command` is given the number of an inherited socket as its last argument."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C is for the front, which drains
            )
        self.connection = Connection(ours.detach())

    def kill(self) -> None:
        """End it, unless it has ended."""
        self.process.kill()
        self.process.wait()


class EngineProcess:
    """One process of engines, spoken to and watched. Safe from any thread.

    `on_death` is called once, in a thread of this object's, if the process ends without stop().
    """

    def __init__(
        self, host: HostProcess, max_step_seconds: float, on_death: Callable[[str], None]
    ) -> None:
        self._process, self._connection = host.process, host.connection
        self._max_step_seconds, self._on_death = max_step_seconds, on_death
        self._lock = threading.Lock()  # guards the four below
        self._death: str | None = None
        self._is_stopping = False
        self._engines: dict[str, RemoteEngine] = {}
        self._loads: dict[str, _LoadUnderWay] = {}
        self._unloads: dict[str, Future[None]] = {}
        self._last_pulse = time.monotonic() + _START_SECONDS  # that imports may take
        self._stuck = ""
        self._outbound: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._read, name="engines-in", daemon=True),
            threading.Thread(target=self._write, name="engines-out", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._death is None

    def load(
        self, key: str, request: Any, on_progress: OnProgress, make_observer: MakeObserver
    ) -> Future[RemoteEngine]:
        """Have an engine made. The future raises LoadError, or EngineError if the process dies."""
        future: Future[RemoteEngine] = _promise()
        with self._lock:
            if self._death is not None:
                future.set_exception(EngineError(self._death))
                return future
            if key in self._loads or key in self._engines:
                raise ValueError(f"{key} is loaded, or being loaded")
            self._loads[key] = _LoadUnderWay(future, on_progress, make_observer)
        self.send(messages.Load(key, request))
        return future

    def unload(self, engine: RemoteEngine, seconds: float) -> Future[None]:
        """End an engine, after so many seconds for its sequences; done when its memory is free.

        math.inf: however long they take. Asked for again, it can only come sooner.
        """
        key = engine.key
        with self._lock:
            if self._death is not None or self._engines.get(key) is not engine:
                done: Future[None] = _promise()
                done.set_result(None)
                return done
            if key in self._unloads:
                self.send(messages.Hasten(key, seconds))
            else:
                self._unloads[key] = _promise()
                self.send(messages.Unload(key, seconds))
            return self._unloads[key]

    def stop(self) -> None:
        """End the process, its engines drained or not."""
        with self._lock:
            self._is_stopping = True
        self._outbound.put(None)  # after what was sent so far
        for thread in self._threads:
            thread.join(_PATIENCE)
        if self._process.poll() is None:
            self._process.kill()

    def send(self, message: object) -> None:
        self._outbound.put(message)

    # -- in the threads

    def _write(self) -> None:
        while (message := self._outbound.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return  # it has died, which the reader sees
        with (
            contextlib.suppress(OSError),
            socket.socket(fileno=os.dup(self._connection.fileno())) as end,
        ):
            end.shutdown(socket.SHUT_WR)  # the host takes this for our end, and ends

    def _read(self) -> None:
        try:
            while True:
                if self._connection.poll(WATCH_SECONDS):
                    self._handle(self._connection.recv())
                self._watch()
        except (EOFError, OSError):
            self._ended()
        except Exception:  # ours: nobody would hear of anything any more
            log.exception("what the engines' process says cannot be handled")
            self._process.kill()
            self._ended()

    def _handle(self, message: object) -> None:
        match message:
            case messages.Step():
                engine = self._engines.get(message.key)
                if engine is not None:
                    engine.receive(message)
            case messages.Pulse():
                self._last_pulse = time.monotonic()
                for key in message.dead:
                    self._fail_engine(key)
                worst = max(message.busy.values(), default=0.0)
                if worst > self._max_step_seconds:
                    self._kill(f"a step has been running for {worst:.0f} s")
            case messages.Progress():
                self._loads[message.key].on_progress(message.phase)
            case messages.Loaded():
                self._loaded(message)
            case messages.LoadFailed():
                with self._lock:
                    load = self._loads.pop(message.key)
                load.future.set_exception(LoadError(message.message))
            case messages.Unloaded():
                with self._lock:
                    del self._engines[message.key]
                    future = self._unloads.pop(message.key)
                future.set_result(None)

    def _loaded(self, message: messages.Loaded) -> None:
        load = self._loads[message.key]
        engine = RemoteEngine(self, message, load.make_observer)
        with self._lock:
            del self._loads[message.key]
            self._engines[message.key] = engine
        load.future.set_result(engine)

    def _fail_engine(self, key: str) -> None:
        """Its thread has ended; one that is being unloaded was asked to."""
        engine = self._engines.get(key)
        if engine is not None and engine.is_alive and key not in self._unloads:
            engine.fail("The engine has failed")

    def _watch(self) -> None:
        silent = time.monotonic() - self._last_pulse
        if silent > self._max_step_seconds:
            self._kill(f"it has said nothing for {silent:.0f} s")

    def _kill(self, why: str) -> None:
        self._stuck = self._stuck or why
        self._process.kill()  # seen as the connection's end

    def _ended(self) -> None:
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it has closed the connection, and stays
            self._process.kill()
            code = self._process.wait()
        self._connection.close()
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"code {code}"
        why = f"; it was stuck: {self._stuck}" if self._stuck else ""
        with self._lock:
            self._death = f"The engines' process has ended with {how}{why}"
            is_unforeseen = not self._is_stopping
        if is_unforeseen:
            log.error("%s", self._death)
        for engine in list(self._engines.values()):
            engine.fail("The engine's process has ended")
        for load in self._loads.values():
            load.future.set_exception(EngineError(self._death))
        for future in self._unloads.values():
            future.set_result(None)
        self._outbound.put(None)
        if is_unforeseen:
            self._on_death(self._death)


def _promise() -> Future[Any]:
    """One that nobody can cancel: not a waiter who gives up for the others, and not for us."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(frozen=True)
class _LoadUnderWay:
    future: Future[RemoteEngine]
    on_progress: OnProgress
    make_observer: MakeObserver


class RemoteEngine:
    """As Engine, in front: admission and streams are here, the rest is in its process."""

    def __init__(
        self, process: EngineProcess, loaded: messages.Loaded, make_observer: MakeObserver
    ) -> None:
        self.key, self.about = loaded.key, loaded.about
        self.limits: RunnerLimits = loaded.limits
        self._process = process
        self._gauges = Gauges(num_pages_total=loaded.limits.num_pages)
        config = loaded.config
        self._admission = Admission(
            loaded.limits,
            config.max_waiting + min(config.max_running, loaded.limits.max_batch),
            config.max_waiting_tokens,
            lambda: self._gauges,
        )
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._number_of: dict[Stream, int] = {}
        self._outbox = StreamOutbox()
        self._receiving = threading.Lock()
        self._observer = make_observer(self)

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive and self._admission.error is None

    @property
    def is_accepting(self) -> bool:
        return self._admission.is_open and self.is_alive

    def gauges(self) -> Gauges:
        """The state after the last step; submissions not yet seen count as waiting."""
        gauges, admission = self._gauges, self._admission
        return replace(
            gauges,
            num_waiting=max(0, admission.num_unfinished - gauges.num_running),
            num_waiting_tokens=admission.num_waiting_tokens,
        )

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, share_key: str | None = ""
    ) -> Stream:
        """As Engine.submit."""
        self._admission.check(prompt_ids, params)
        stream = Stream(asyncio.get_running_loop(), self._end)
        number = next(self._numbers)
        with self._admission.lock:
            self._admission.enter(len(prompt_ids), params.max_tokens)
            self._streams[number], self._number_of[stream] = stream, number
            self._process.send(
                messages.Submit(self.key, number, tuple(prompt_ids), params, share_key)
            )
        return stream

    def check_room(self, num_sequences: int, num_prompt_tokens: int) -> None:
        """Whether so many may be submitted now, with so many prompt tokens in all.

        Raises OverloadedError, RequestError if they never could be, EngineError (draining or dead).
        """
        self._admission.check_room(num_sequences, num_prompt_tokens)

    async def drain(self, seconds: float) -> None:
        """As Engine.drain; afterwards its memory is free."""
        self._admission.close()
        await asyncio.wrap_future(self._process.unload(self, seconds))

    def _end(self, stream: Stream, reason: EarlyEnd, num_generated: int | None) -> None:
        number = self._number_of.get(stream)
        if number is not None:
            self._process.send(messages.End(self.key, number, reason, num_generated))

    # -- in the process object's reading thread

    def receive(self, step: messages.Step) -> None:
        with self._receiving:
            for name, arguments in step.observed:
                if name == "on_step":
                    self._admission.on_step(*arguments)
                getattr(self._observer, name)(*arguments)
            self._gauges = step.gauges
            for number, event in step.events:
                stream = self._streams.get(number)
                if stream is None:  # it was told of the engine's death meanwhile
                    continue
                self._outbox.put(stream, event)
                if isinstance(event, FinishEvent):
                    self._forget(number, stream)
            self._outbox.flush()

    def fail(self, message: str) -> None:
        """The engine is gone: whoever waits is told."""
        self._admission.fail(EngineError(message, "engine_dead"))
        with self._receiving:
            for number, stream in list(self._streams.items()):
                event = FinishEvent("error", 0, 0, error=EngineError(message, "engine_dead"))
                self._outbox.put(stream, event)
                self._forget(number, stream)
                self._observer.on_finish(event)
            self._gauges = Gauges(
                num_pages_total=self.limits.num_pages,
                num_entered_tokens=self._gauges.num_entered_tokens,
                num_entered_completion_tokens=self._gauges.num_entered_completion_tokens,
            )
            self._outbox.flush()

    def _forget(self, number: int, stream: Stream) -> None:
        del self._streams[number], self._number_of[stream]
        self._admission.leave()
