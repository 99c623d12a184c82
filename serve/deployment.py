"""The model's libraries, live: loaded, unloaded, switched and split while the others serve on.

Lives in the event loop of the server, and drives the engines' process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from profiles import Profile, ProfileError, list_profiles, load_profile
from serve.api.admin import LibraryState, ReloadReport, State
from serve.api.app import ServedModel, ServedModels
from serve.config import Settings
from serve.engine.remote import EngineProcess, HostProcess, RemoteEngine
from serve.errors import ConfigError, ConflictError, EngineError, RequestError, ServeError
from serve.grammar import Grammars
from serve.metrics import EngineMetrics, Registry
from serve.placement import LibraryFacts, LoadRequest, Placement, start_host
from serve.tokenizer import Tokenizer

Say = Callable[[str], None]
_LIVE = frozenset({("library", "profile"), ("library", "also"), ("traffic", "weights")})


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the model in front.

    other_names: what it goes by beside its name. chat_template: its source; None: the shipped one.
    """

    name: str
    other_names: tuple[str, ...]
    tokenizer: Tokenizer
    grammars: Grammars
    chat_template: str | None


@dataclass
class _Library:
    """A placement that this server has to do with.

    `done`: its load or unload, under way. `served`: what has its names; while it is loaded again
    after a crash, the dead one.
    """

    placement: Placement
    state: State = "loading"
    phase: str | None = None
    error: str | None = None
    served: ServedModel | None = None
    engine: RemoteEngine | None = None
    metrics: EngineMetrics | None = None
    done: asyncio.Task[None] | None = None


class Deployment:
    """Implements the API's Admin. Its methods belong to the event loop.

    read_settings: reads them again. on_death: called, in the loop, when the engines' process has
    ended by itself and is not to be started again.
    """

    def __init__(
        self,
        settings: Settings,
        model: ModelFacts,
        registry: Registry,
        say: Say,
        read_settings: Callable[[], Settings],
        on_death: Callable[[str], None],
        host: HostProcess,
    ) -> None:
        """`host`: the first one, which is this object's from now on."""
        self._settings, self._model, self._registry, self._say = settings, model, registry, say
        self._read_settings, self._on_death = read_settings, on_death
        self.served = ServedModels(sticky_header=settings.traffic.sticky_header)
        self._libraries: dict[Placement, _Library] = {}
        self._loop = asyncio.get_running_loop()
        self._changing = asyncio.Lock()  # one reload at a time
        self._restarting: asyncio.Task[None] | None = None
        self._process = self._watched(host)

    # -- at the start and the end

    async def start(self) -> None:
        """Load all that the settings name. Raises what the first failure raises."""
        wanted = self._wanted(self._settings)
        for placement in wanted:
            self._begin_load(placement)
        for placement in wanted:
            await self._loaded(placement)
        self._apply(self._settings)

    async def drain(self, seconds: float | None = None) -> None:
        """Take no more requests, give the running ones so long, and end the engines' process."""
        seconds = self._settings.server.drain_seconds if seconds is None else seconds
        engines = [library.engine for library in self._libraries.values() if library.engine]
        await asyncio.gather(*(engine.drain(seconds) for engine in engines))
        await asyncio.to_thread(self._process.stop)

    def close(self) -> None:
        """End the engines' process at once."""
        self._process.stop()

    # -- Admin

    async def load(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        library = self._begin_load(self._placement(profile, backend))
        if wait:
            await self._loaded(library.placement)
        return self._state(library)

    async def unload(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        library = self._existing(self._placement(profile, backend))
        if library.state == "failed":
            del self._libraries[library.placement]
            return self._state(library)
        if library.state == "loading":
            raise ConflictError(f"{library.placement} is being loaded; wait until it is")
        if library.state == "loaded":
            self._check_unused(library)
            self._begin_unload(library)
        if wait and library.done is not None:
            await asyncio.shield(library.done)
        return self._state(library)

    async def make_default(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        library = self._begin_load(self._placement(profile, backend))
        if library.served is not None:
            self.served.set_default(library.served)
        elif wait:
            await self._switch_when_loaded(library.placement)
        else:
            task = self._loop.create_task(self._switch_when_loaded(library.placement))
            task.add_done_callback(_retrieved)
        return self._state(library)

    async def reload(self) -> ReloadReport:
        """Raises ServeError, and changes nothing, if the settings are bad or cannot change live."""
        async with self._changing:
            try:
                new = self._read_settings()
            except ConfigError as error:
                raise RequestError(str(error), error.key, "invalid_settings") from error
            changed = _changed(self._settings, new)
            fixed = [key for key in changed if tuple(key.split(".")) not in _LIVE]
            if fixed:
                raise RequestError(
                    f"these settings need a restart: {', '.join(fixed)}; nothing was changed",
                    "settings",
                    "restart_required",
                )
            await self._move_to(new)
            self._settings = new
        return ReloadReport(changed=changed, libraries=self.states())

    def states(self) -> list[LibraryState]:
        return [self._state(library) for library in self._libraries.values()]

    def profiles(self) -> list[dict[str, Any]]:
        folder = self._folder()
        return [
            _described(load_profile(name, folder))
            | {"libraries": [self._with_coverage(x) for x in self._of_profile(name)]}
            for name in list_profiles(folder)
        ]

    # -- loads and unloads

    def _begin_load(self, placement: Placement) -> _Library:
        """Have it loaded, unless it is, or is being."""
        found = self._libraries.get(placement)
        if found is not None and found.state in ("loading", "loaded"):
            return found
        if found is not None and found.state == "unloading":
            raise ConflictError(f"{placement} is being unloaded; wait until it is")
        self._check_exists(placement)
        library = self._libraries[placement] = _Library(placement, phase="queued")
        library.done = self._loop.create_task(self._load(library))
        library.done.add_done_callback(_retrieved)
        return library

    async def _load(self, library: _Library) -> None:
        placement = library.placement

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
            future = self._process.load(str(placement), request, on_progress, observer)
            library.engine = await asyncio.wrap_future(future)
            self._add(library, library.engine)
        except Exception as error:
            library.state, library.phase, library.error = "failed", None, str(error)
            raise

    def _progress(self, library: _Library, phase: str) -> None:
        library.phase = phase
        self._say(f"{library.placement}: {phase}")

    def _add(self, library: _Library, engine: RemoteEngine) -> None:
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
        is_home = placement.backend == self._settings.library.backend
        short = (f"{model.name}@{placement.profile}",) if is_home else ()
        served = ServedModel(
            name=model.name,
            aliases=(*short, f"{model.name}@{placement}"),
            backend=placement.backend,
            profile=placement.profile,
            quantization=facts.quantization,
            max_context=engine.limits.max_context,
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

    async def _loaded(self, placement: Placement) -> ServedModel:
        """Wait for its load. Raises what that raised."""
        library = self._libraries[placement]
        if library.done is not None:
            await asyncio.shield(library.done)
        if library.served is None:
            raise EngineError(f"{placement} is not loaded: {library.error or 'it was unloaded'}")
        return library.served

    async def _switch_when_loaded(self, placement: Placement) -> None:
        self.served.set_default(await self._loaded(placement))

    def _check_unused(self, library: _Library) -> None:
        served = library.served
        if served is self.served.default and not self.served.traffic:
            raise ConflictError(
                f"{library.placement} is what the name {self._model.name!r} means: switch first"
            )
        if served in self.served.traffic:
            raise ConflictError(f"{library.placement} has a share of the traffic: end that")

    def _begin_unload(self, library: _Library) -> None:
        assert library.served is not None
        self.served.remove(library.served)
        library.state, library.phase = "unloading", "finishing what runs"
        library.done = self._loop.create_task(self._unload(library))

    async def _unload(self, library: _Library) -> None:
        assert library.engine is not None
        await library.engine.drain(self._settings.server.drain_seconds)
        if library.metrics is not None:
            library.metrics.close()
        library.state, library.phase = "unloaded", None
        if self._libraries.get(library.placement) is library:
            del self._libraries[library.placement]

    # -- settings

    def _wanted(self, settings: Settings) -> list[Placement]:
        """What these settings have loaded, the default first."""
        backend = settings.library.backend
        texts = (settings.library.profile, *settings.library.also, *settings.traffic.weights)
        return list(dict.fromkeys(Placement.parse(text, backend) for text in texts))

    async def _move_to(self, settings: Settings) -> None:
        """Load what is missing, switch, unload what is left over; or change nothing, and raise."""
        wanted = self._wanted(settings)
        before = set(self._libraries)
        try:
            for placement in wanted:
                self._begin_load(placement)
            for placement in wanted:
                await self._loaded(placement)
        except Exception:
            for placement in set(self._libraries) - before:
                await self._give_up(placement)
            raise
        self._apply(settings)
        for library in list(self._libraries.values()):
            if library.state == "loaded" and library.placement not in wanted:
                self._begin_unload(library)

    async def _give_up(self, placement: Placement) -> None:
        library = self._libraries[placement]
        if library.done is not None:
            await asyncio.wait([library.done])
        if library.state == "loaded":
            self._begin_unload(library)
        else:
            del self._libraries[placement]

    def _apply(self, settings: Settings) -> None:
        """The default and the split, of libraries that are loaded."""
        backend = settings.library.backend

        def served(text: str) -> ServedModel:
            found = self._libraries[Placement.parse(text, backend)].served
            assert found is not None
            return found

        self.served.set_default(served(settings.library.profile))
        weights = settings.traffic.weights
        self.served.set_traffic({served(text): weight for text, weight in weights.items()})

    def _placement(self, profile: str, backend: str | None) -> Placement:
        return Placement(backend or self._settings.library.backend, profile)

    def _check_exists(self, placement: Placement) -> None:
        """Raises RequestError; whether the machine has the backend, its load tells."""
        try:
            load_profile(placement.profile, self._folder())
        except ProfileError as error:
            raise RequestError(str(error), "profile", "profile_not_found") from error

    def _existing(self, placement: Placement) -> _Library:
        if placement not in self._libraries:
            loaded = [x.placement for x in self._libraries.values() if x.state == "loaded"]
            known = ", ".join(map(str, loaded))
            raise RequestError(f"{placement} is not loaded; what is: {known}", "profile")
        return self._libraries[placement]

    def _folder(self) -> Path | None:
        given = self._settings.library.profiles_dir
        return Path(given) if given else None

    # -- what is told

    def _state(self, library: _Library) -> LibraryState:
        placement, traffic = library.placement, self.served.traffic
        share = 0.0
        if traffic:
            share = sum(w for m, w in traffic.items() if m is library.served) / sum(
                traffic.values()
            )
        elif library.served is not None and library.served is self.served.default:
            share = 1.0
        return LibraryState(
            profile=placement.profile,
            backend=placement.backend,
            name=f"{self._model.name}@{placement}",
            state=library.state,
            phase=library.phase,
            error=library.error,
            is_default=library.served is not None and library.served is self.served.default,
            traffic=share,
            digest=None if library.engine is None else library.engine.about.digest,
        )

    def _of_profile(self, name: str) -> list[_Library]:
        return [x for x in self._libraries.values() if x.placement.profile == name]

    def _with_coverage(self, library: _Library) -> dict[str, Any]:
        coverage = None if library.engine is None else library.engine.about.coverage
        return self._state(library).model_dump() | {"coverage": coverage}

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
        self._process = self._watched(start_host(self._settings))
        loaded = [x for x in self._libraries.values() if x.served is not None]
        self._libraries = {}
        for dead in loaded:
            if dead.metrics is not None:
                dead.metrics.close()
            library = _Library(dead.placement, phase="restarting", served=dead.served)
            self._libraries[dead.placement] = library
            library.done = self._loop.create_task(self._load(library))
            library.done.add_done_callback(_retrieved)
        try:
            for library in list(self._libraries.values()):
                assert library.done is not None
                await library.done
        except ServeError as error:
            self._on_death(f"the engines could not be started again: {error}")
        else:
            self._say("the engines are back")


def _retrieved(task: asyncio.Task[None]) -> None:
    """Its error is in the library's state; nobody else may be waiting for it."""
    if not task.cancelled():
        task.exception()


def _changed(old: Settings, new: Settings) -> list[str]:
    """Dotted keys whose values differ."""
    keys = []
    for section in fields(Settings):
        before, after = _values(getattr(old, section.name)), _values(getattr(new, section.name))
        keys += [f"{section.name}.{key}" for key in before if before[key] != after[key]]
    return keys


def _values(section: Any) -> Mapping[str, Any]:
    return dict(section) if hasattr(section, "model_fields") else vars(section)


def _described(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "description": profile.description,
        "rules": {
            section: [
                {
                    "id": use.rule.id,
                    "meaning": use.rule.meaning,
                    "parameters": {
                        p.name: {
                            "value": use.values[p.name],
                            "legal": list(p.legal),
                            "meaning": p.meaning,
                        }
                        for p in use.rule.parameters
                    },
                }
                for use in uses
            ]
            for section, uses in profile.sections.items()
        },
    }
