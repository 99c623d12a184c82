"""Which libraries the settings want, and what an administrator does about them, live.

Lives in the event loop of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import fields
from pathlib import Path
from typing import Any

from profiles import ProfileError, RuleUse, list_profiles, load_profile
from serve.api.admin import LibraryState, ReloadReport
from serve.api.app import ServedModel
from serve.config import Settings
from serve.errors import ConfigError, ConflictError, RequestError
from serve.libraries import Libraries, Library
from serve.placement import BACKENDS, Placement

_LIVE = frozenset({"library.profile", "library.also", "traffic.weights"})


class Deployment:
    """Implements the API's Admin over the libraries. read_settings: reads them again."""

    def __init__(
        self,
        settings: Settings,
        model_name: str,
        libraries: Libraries,
        read_settings: Callable[[], Settings],
    ) -> None:
        self._settings, self._model_name = settings, model_name
        self._libraries, self._read_settings = libraries, read_settings
        self._changing = asyncio.Lock()  # one reload at a time
        self._chosen: Placement | None = None  # what is to be the default, once it is loaded
        self._requested: set[Placement] = set()  # since the last reload began
        self._tasks: set[asyncio.Task[None]] = set()  # that wait for a load

    async def start(self) -> None:
        """Load all that the settings name. Raises what the first failure raises."""
        async with self._changing:
            await self._load_all(self._wanted(self._settings))
            self._apply(self._settings)

    # -- Admin

    async def load(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        library = self._begin_load(self._placement(profile, backend))
        self._requested.add(library.placement)
        if wait:
            await self._libraries.loaded(library.placement)
        return self._state(library)

    async def unload(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        library = self._existing(self._placement(profile, backend))
        if library.state == "loading":
            raise ConflictError(f"{library.placement} is being loaded; wait until it is")
        if library.state == "loaded":
            self._check_unused(library)
        if library.state in ("loaded", "failed"):
            self._libraries.unload(library)
        if wait and library.state == "unloading" and library.done is not None:
            await asyncio.shield(library.done)
        return self._state(library)

    async def make_default(self, profile: str, backend: str | None, wait: bool) -> LibraryState:
        library = self._begin_load(self._placement(profile, backend))
        self._chosen = library.placement
        self._requested.add(library.placement)
        if library.state == "loaded" or wait:
            await self._switch_when_loaded(library.placement)
        else:
            self._begin_task(self._switch_when_loaded(library.placement))
        return self._state(library)

    async def reload(self) -> ReloadReport:
        """Raises ServeError, and changes nothing, if the settings are bad or cannot change live."""
        async with self._changing:
            try:
                new = self._read_settings()
            except ConfigError as error:
                raise RequestError(str(error), error.key, "invalid_settings") from error
            changed = _changed(self._settings, new)
            fixed = [key for key in changed if key not in _LIVE]
            if fixed:
                raise RequestError(
                    f"these settings need a restart: {', '.join(fixed)}",
                    "settings",
                    "restart_required",
                )
            await self._move_to(new)
            self._settings = new
        return ReloadReport(changed=changed, libraries=self.states())

    def states(self) -> list[LibraryState]:
        return [self._state(library) for library in self._libraries]

    def profiles(self) -> list[dict[str, Any]]:
        folder = self._folder()
        return [
            _described(name, folder)
            | {"libraries": [self._with_coverage(x) for x in self._of_profile(name)]}
            for name in list_profiles(folder)
        ]

    # -- settings

    def _wanted(self, settings: Settings) -> list[Placement]:
        """What these settings have loaded, the default first."""
        backend = settings.library.backend
        texts = (settings.library.profile, *settings.library.also, *settings.traffic.weights)
        return list(dict.fromkeys(Placement.parse(text, backend) for text in texts))

    async def _load_all(self, wanted: list[Placement]) -> None:
        for placement in wanted:
            self._check_exists(placement)
        for placement in wanted:
            self._libraries.load(placement)
        for placement in wanted:
            await self._libraries.loaded(placement)

    async def _move_to(self, settings: Settings) -> None:
        """Load what is missing, switch, unload what is left over; or change nothing, and raise.

        What is asked for meanwhile stays.
        """
        wanted = self._wanted(settings)
        self._requested.clear()
        before = {x.placement for x in self._libraries if x.state in ("loading", "loaded")}
        try:
            await self._load_all(wanted)
            self._apply(settings)
        except Exception:
            added = set(wanted) - before - self._requested
            for library in self._libraries:
                if library.placement in added:
                    await self._give_up(library)
            raise
        stay = self._requested.union(wanted)
        for library in self._libraries:
            if library.placement not in stay:
                self._begin_task(self._give_up(library))

    async def _give_up(self, library: Library) -> None:
        """Unload it, if need be as soon as it is loaded, or forget it."""
        if library.state == "loading" and library.done is not None:
            await asyncio.wait([library.done])
        is_asked_for = library.placement in self._requested
        if library.state in ("loaded", "failed") and not is_asked_for:
            self._libraries.unload(library)

    def _apply(self, settings: Settings) -> None:
        """The default and the split. Raises ConflictError, and changes nothing, if one is gone."""
        backend = settings.library.backend

        def served(text: str) -> ServedModel:
            return self._libraries.served_by(Placement.parse(text, backend))

        default, traffic = served(settings.library.profile), dict[ServedModel, float]()
        for text, weight in settings.traffic.weights.items():
            model = served(text)  # `full` and `cpu:full` may be the same
            traffic[model] = traffic.get(model, 0) + weight
        self._chosen = Placement.parse(settings.library.profile, backend)
        self._libraries.served.set_default(default)
        self._libraries.served.set_traffic(traffic)

    # -- one library

    def _begin_load(self, placement: Placement) -> Library:
        self._check_exists(placement)
        return self._libraries.load(placement)

    async def _switch_when_loaded(self, placement: Placement) -> None:
        """Unless another one has been chosen meanwhile."""
        model = await self._libraries.loaded(placement)
        if self._chosen == placement:
            self._libraries.served.set_default(model)

    def _begin_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        """Why a load failed, is in the library's state."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    def _check_unused(self, library: Library) -> None:
        served = self._libraries.served
        if library.served is served.default and not served.traffic:
            raise ConflictError(
                f"{library.placement} is what the name {self._model_name!r} means: switch first"
            )
        if library.served in served.traffic:
            raise ConflictError(f"{library.placement} has a share of the traffic: end that")

    def _placement(self, profile: str, backend: str | None) -> Placement:
        return Placement(backend or self._settings.library.backend, profile)

    def _check_exists(self, placement: Placement) -> None:
        """Raises RequestError; whether the machine has the backend, its load tells."""
        if placement.backend not in BACKENDS:
            known = ", ".join(BACKENDS)
            message = f"unknown backend {placement.backend!r}; known: {known}"
            raise RequestError(message, "backend", "backend_not_found")
        folder = self._folder()
        if placement.profile not in (profiles := list_profiles(folder)):
            message = f"no such profile: {placement.profile!r}; known: {', '.join(profiles)}"
            raise RequestError(message, "profile", "profile_not_found")
        try:
            profile = load_profile(placement.profile, folder)
            profile.rules_for(placement.backend, BACKENDS[placement.backend])
        except ProfileError as error:
            raise RequestError(str(error), "profile") from error

    def _existing(self, placement: Placement) -> Library:
        library = self._libraries.get(placement)
        if library is None:
            loaded = [x.placement for x in self._libraries if x.state == "loaded"]
            known = ", ".join(map(str, loaded))
            raise RequestError(f"{placement} is not loaded; what is: {known}", "profile")
        return library

    def _folder(self) -> Path | None:
        given = self._settings.library.profiles_dir
        return Path(given) if given else None

    # -- what is told

    def _state(self, library: Library) -> LibraryState:
        placement, served = library.placement, self._libraries.served
        is_default = library.served is not None and library.served is served.default
        share = float(is_default)
        if served.traffic:
            own = sum(weight for model, weight in served.traffic.items() if model is library.served)
            share = own / sum(served.traffic.values())
        return LibraryState(
            profile=placement.profile,
            backend=placement.backend,
            name=f"{self._model_name}@{placement}",
            state=library.state,
            phase=library.phase,
            error=library.error,
            is_default=is_default,
            traffic=share,
            digest=None if library.engine is None else library.engine.about.digest,
        )

    def _of_profile(self, name: str) -> list[Library]:
        return [x for x in self._libraries if x.placement.profile == name]

    def _with_coverage(self, library: Library) -> dict[str, Any]:
        coverage = None if library.engine is None else library.engine.about.coverage
        return self._state(library).model_dump() | {"coverage": coverage}


def _changed(old: Settings, new: Settings) -> list[str]:
    """Dotted keys whose values differ."""
    keys = []
    for section in fields(Settings):
        before, after = vars(getattr(old, section.name)), vars(getattr(new, section.name))
        keys += [f"{section.name}.{key}" for key in before if before[key] != after[key]]
    return keys


def _described(name: str, folder: Path | None) -> dict[str, Any]:
    """What a profile's file says; of one that cannot be read, why."""
    try:
        profile = load_profile(name, folder)
    except ProfileError as error:
        return {"name": name, "description": "", "error": str(error), "rules": {}}
    rules = {section: [_rule(use) for use in uses] for section, uses in profile.sections.items()}
    return {"name": name, "description": profile.description, "rules": rules}


def _rule(use: RuleUse) -> dict[str, Any]:
    parameters = {
        p.name: {"value": use.values[p.name], "legal": list(p.legal), "meaning": p.meaning}
        for p in use.rule.parameters
    }
    return {"id": use.rule.id, "meaning": use.rule.meaning, "parameters": parameters}
