"""The model's libraries in the engines' process: loaded, unloaded, and loaded again if it dies.

Lives in the event loop of the server. Which of them the settings want is the deployment's matter.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serve.api.admin import State
from serve.api.app import ServedModel, ServedModels
from serve.config import Settings
from serve.engine.remote import EngineProcess, HostProcess, RemoteEngine
from serve.errors import ConflictError, EngineError
from serve.grammar import Grammars
from serve.metrics import EngineMetrics, Registry
from serve.placement import LibraryFacts, LoadRequest, Placement, start_host
from serve.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the model in front.

    other_names: what it goes by beside its name. max_context: tokens. chat_template: its source;
    None: the shipped one.
    """

    name: str
    other_names: tuple[str, ...]
    max_context: int
    tokenizer: Tokenizer
    grammars: Grammars
    chat_template: str | None = None


@dataclass(eq=False)
class Library:
    """A placement that this server has to do with.

    phase: of what is under way. error: why its load failed. served: what has its names; while it
    is loaded again after a crash, the dead one. done: its load or unload, under way.
    """

    placement: Placement
    state: State = "loading"
    phase: str | None = None
    error: str | None = None
    served: ServedModel | None = None
    engine: RemoteEngine | None = None
    metrics: EngineMetrics | None = None
    done: asyncio.Task[None] | None = None


class Libraries:
    """By placement. `served` has those that are loaded, for the API. Belongs to the event loop."""

    def __init__(
        self,
        settings: Settings,
        model: ModelFacts,
        registry: Registry,
        say: Say,
        on_death: Callable[[str], None],
        host: HostProcess,
        start: Callable[[Settings], HostProcess] = start_host,
    ) -> None:
        """`host`: the first one, which is this object's from now on; `start` makes the next ones.

        on_death: called if the engines' process has ended by itself and is not started again.
        """
        self._settings, self._model, self._registry, self._say = settings, model, registry, say
        self._on_death, self._start_host = on_death, start
        self.served = ServedModels(sticky_header=settings.traffic.sticky_header)
        self._libraries: dict[Placement, Library] = {}
        self._leaving: set[Library] = set()  # being unloaded; another may have the placement
        self._loop = asyncio.get_running_loop()
        self._restarting: asyncio.Task[None] | None = None
        self._is_ending = False
        self._process = self._watched(host)

    def __iter__(self) -> Iterator[Library]:
        return iter(list(self._libraries.values()))

    def get(self, placement: Placement) -> Library | None:
        return self._libraries.get(placement)

    def load(self, placement: Placement) -> Library:
        """Begin to load it, unless it is loaded or being loaded; behind its unload, if need be."""
        found = self._libraries.get(placement)
        if found is not None and found.state in ("loading", "loaded"):
            return found
        library = self._libraries[placement] = Library(placement, phase="queued")
        if found is not None and found.state == "unloading":
            library.phase = "waiting until it is unloaded"
            self._begin(library, after=found.done)
        else:
            self._begin(library)
        return library

    async def loaded(self, placement: Placement) -> ServedModel:
        """Wait for its load. Raises what that raised."""
        library = self._libraries.get(placement)
        if library is not None and library.done is not None:
            await asyncio.shield(library.done)
        return self.served_by(placement)

    def served_by(self, placement: Placement) -> ServedModel:
        """Raises ConflictError if it is not loaded."""
        library = self._libraries.get(placement)
        if library is None or library.state != "loaded" or library.served is None:
            raise ConflictError(f"{placement} is not loaded any more")
        return library.served

    def unload(self, library: Library) -> None:
        """Begin to unload one that is loaded; what it computes finishes. Forget one that failed."""
        if library.state == "failed":
            del self._libraries[library.placement]
            return
        assert library.state == "loaded"
        assert library.served is not None
        self.served.remove(library.served)
        library.state, library.phase = "unloading", "finishing what runs"
        self._leaving.add(library)
        library.done = self._loop.create_task(self._unload(library))

    async def drain(self, seconds: float) -> None:
        """Take no more requests, give the running ones so long, and end the engines' process."""
        self._is_ending = True
        libraries = self._leaving.union(self)
        engines = [library.engine for library in libraries if library.engine is not None]
        await asyncio.gather(*(engine.drain(seconds) for engine in engines))
        await asyncio.to_thread(self._process.stop)

    def close(self) -> None:
        """End the engines' process at once."""
        self._process.stop()

    # -- one load, one unload

    def _begin(self, library: Library, after: asyncio.Task[None] | None = None) -> None:
        library.done = self._loop.create_task(self._load(library, after))
        library.done.add_done_callback(_retrieved)

    async def _load(self, library: Library, after: asyncio.Task[None] | None) -> None:
        placement = library.placement
        if after is not None:
            await asyncio.wait([after])

        def on_progress(phase: str) -> None:  # in the process object's thread
            self._loop.call_soon_threadsafe(self._progress, library, phase)

        def observer(engine: RemoteEngine) -> EngineMetrics:
            library.metrics = EngineMetrics(
                self._registry,
                self._model.name,
                placement.backend,
                placement.profile,
                gauges=engine.gauges,
                window_seconds=self._settings.metrics.window_seconds,
            )
            return library.metrics

        request = LoadRequest(self._settings, placement)
        try:
            if self._is_ending:
                raise EngineError("The server is shutting down", "draining")
            future = self._process.load(str(placement), request, on_progress, observer)
            library.engine = await asyncio.wrap_future(future)
            if self._is_ending:
                await library.engine.drain(0)
                raise EngineError("The server is shutting down", "draining")
            self._serve(library, library.engine)
        except Exception as error:
            library.state, library.phase, library.error = "failed", None, str(error)
            raise

    def _progress(self, library: Library, phase: str) -> None:
        library.phase = phase
        self._say(f"{library.placement}: {phase}")

    def _serve(self, library: Library, engine: RemoteEngine) -> None:
        facts: LibraryFacts = engine.about
        metrics, model, placement = library.metrics, self._model, library.placement
        assert metrics is not None
        metrics.on_library(
            facts.source,
            facts.quantization,
            facts.digest,
            facts.tvm_version,
            compile_seconds=facts.compile_seconds,
        )
        max_context = engine.limits.max_context
        if max_context < model.max_context:
            self._say(
                f"WARNING: {placement}: runner.kv_tokens holds {max_context} tokens, of the "
                f"{model.max_context} that a sequence of {model.name} may have"
            )
        is_home = placement.backend == self._settings.library.backend
        short = (f"{model.name}@{placement.profile}",) if is_home else ()
        served = ServedModel(
            name=model.name,
            aliases=(*short, f"{model.name}@{placement}"),
            backend=placement.backend,
            profile=placement.profile,
            quantization=facts.quantization,
            max_context=max_context,
            digest=facts.digest,
            created=int(time.time()),
            tokenizer=model.tokenizer,
            engine=engine,
            on_rejected=metrics.on_rejected,
            other_names=model.other_names,
            chat_template=model.chat_template,
            grammars=model.grammars,
        )
        if library.served is None:
            self.served.add(served)
        else:
            self.served.replace(library.served, served)
        library.served = served
        library.state, library.phase = "loaded", None

    async def _unload(self, library: Library) -> None:
        assert library.engine is not None
        await library.engine.drain(math.inf)
        if library.metrics is not None:
            library.metrics.close()
        library.state, library.phase = "unloaded", None
        self._leaving.discard(library)
        if self._libraries.get(library.placement) is library:
            del self._libraries[library.placement]

    # -- the engines' process

    def _watched(self, host: HostProcess) -> EngineProcess:
        def on_death(message: str) -> None:  # in a thread of the process object's
            self._loop.call_soon_threadsafe(self._died, message)

        return EngineProcess(host, self._settings.watchdog.max_step_seconds, on_death)

    def _died(self, message: str) -> None:
        if self._restarting is not None and not self._restarting.done():
            return  # its loads fail, which ends the server
        if self._settings.watchdog.on_death == "exit" or not self.served.names:
            self._on_death(message)
            return
        self._say(f"{message}; starting another one")
        self._restarting = self._loop.create_task(self._restart())

    async def _restart(self) -> None:
        """The same libraries in a new process. Until they are loaded, the dead ones answer: 503."""
        dead = [library for library in self if library.state == "loaded"]
        try:
            self._process = self._watched(self._start_host(self._settings))
            for one in dead:
                self._load_again(one)
            for one in dead:
                await self.loaded(one.placement)
            if not self._process.is_alive:
                raise EngineError("they have died again")
        except Exception as error:
            if not self._is_ending:
                self._on_death(f"the engines could not be started again: {error}")
        else:
            self._say("the engines are back")

    def _load_again(self, dead: Library) -> None:
        if dead.metrics is not None:
            dead.metrics.close()
        again = Library(dead.placement, phase="restarting", served=dead.served)
        self._libraries[dead.placement] = again
        self._begin(again)


def _retrieved(task: asyncio.Task[None]) -> None:
    """Its error is in the library's state; nobody else may be waiting for it."""
    if not task.cancelled():
        task.exception()
