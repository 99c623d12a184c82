"""From settings to a model, a library and a runner. Knows model, compiler and runtime.

Used by the engines' process, and by the commands that work without one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from profiles import Profile, ProfileError, load_profile
from serve.backends import Backend, get_backend
from serve.compiler.cache import LibraryCache, default_cache_dir
from serve.compiler.compile import Compiled, CompileJob, get_library
from serve.config import Settings
from serve.engine.constraint import Constraint
from serve.engine.host import Prepared
from serve.errors import LoadError
from serve.grammar import Grammars
from serve.memory import available_bytes
from serve.model.source import ModelSource, find_model
from serve.placement import LibraryFacts, LoadRequest
from serve.runtime.runner import TVMRunner
from serve.runtime.weights import DeviceWeights
from serve.tokenizer import Tokenizer

Say = Callable[[str], None]
_WHAT_TO_LOWER = "lower runner.kv_tokens, or load fewer profiles, or a smaller model"


@dataclass(frozen=True)
class Selection:
    """What the settings choose: a model, a backend and a profile, found but not yet compiled."""

    model: ModelSource
    backend: Backend
    profile: Profile

    def compile(self, settings: Settings, say: Say) -> Compiled:
        """The library, from the cache or compiled, with progress."""
        job = CompileJob(self.model.config, self.backend, self.profile)
        what = f"{self.model.name} on {self.backend.name} under profile {self.profile.name}"
        return get_library(
            job,
            library_cache(settings),
            lambda phase: say(f"compiling {what}: {phase}"),
            settings.library.compile_time_limit_seconds,
        )


def select(settings: Settings, profile: str | None = None) -> Selection:
    """Find what the settings name. Raises ModelError, BackendError, ProfileError."""
    library = settings.library
    folder = library.profiles_dir
    return Selection(
        find_model(settings.model.source, settings.hub),
        get_backend(library.backend, library.mcpu, library.mattr),
        load_profile(profile or library.profile, Path(folder) if folder else None),
    )


def library_cache(settings: Settings) -> LibraryCache:
    given = settings.library.cache_dir
    return LibraryCache(Path(given) if given else default_cache_dir())


class Loader:
    """Makes engines' parts, for one model: its weights are read once, whatever the profiles."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: ModelSource | None = None
        self._tokenizer: Tokenizer | None = None
        self._grammars: Grammars | None = None  # made when first asked for
        self._weights: dict[str, DeviceWeights] = {}  # by backend

    def prepare(self, request: LoadRequest, report: Say) -> Prepared:
        """Compile if need be, and load. Raises ServeError."""
        settings, placement = request.settings, request.placement
        try:
            chosen = self._select(settings, request)
        except ProfileError as error:
            raise LoadError(str(error)) from error
        chosen.backend.device()  # raises BackendError for what this machine cannot run
        compiled = chosen.compile(settings, report)
        manifest = compiled.library.manifest
        report(f"library {manifest.digest[:12]} ({compiled.source}, {compiled.seconds:.1f} s)")
        start = time.perf_counter()
        self._check_memory(chosen, settings)
        weights, tokenizer = self._parts(chosen)
        try:
            runner = TVMRunner(
                compiled.library, weights, chosen.backend, settings.runner, tokenizer.vocab_size
            )
        except (MemoryError, OSError) as error:
            raise LoadError(f"out of memory for {placement}: {error}; {_WHAT_TO_LOWER}") from error
        report(f"weights of {chosen.model.spec} loaded ({time.perf_counter() - start:.1f} s)")
        facts = LibraryFacts(
            manifest.quantization,
            manifest.digest,
            manifest.tvm_version,
            compiled.source,
            manifest.compile_seconds,
            [dict(kernel) for kernel in manifest.coverage],
        )
        return Prepared(runner, settings.engine, facts, self._constrain)

    def _select(self, settings: Settings, request: LoadRequest) -> Selection:
        placement, library = request.placement, settings.library
        is_given = placement.backend == library.backend  # mcpu and mattr are meant for it
        with self._lock:
            if self._model is None:
                self._model = find_model(settings.model.source, settings.hub)
        folder = Path(library.profiles_dir) if library.profiles_dir else None
        return Selection(
            self._model,
            get_backend(
                placement.backend,
                library.mcpu if is_given else None,
                library.mattr if is_given else None,
            ),
            load_profile(placement.profile, folder),
        )

    def _check_memory(self, chosen: Selection, settings: Settings) -> None:
        """Raises LoadError where it is sure not to fit: the system would kill the process later."""
        free = available_bytes()
        if chosen.backend.family != "cpu" or free is None:
            return
        config = chosen.model.config
        kv_bytes = settings.runner.kv_tokens_for(config.n_positions) * config.kv_bytes_per_token()
        weights = 0 if chosen.backend.name in self._weights else 4 * config.num_parameters
        if kv_bytes + weights > free:
            raise LoadError(
                f"out of memory: {chosen.model.name} needs {weights >> 20} MiB for its weights and "
                f"{kv_bytes >> 20} MiB for its KV cache, and {free >> 20} MiB are free; "
                f"{_WHAT_TO_LOWER}"
            )

    def _constrain(self, grammar: str) -> Constraint:
        """The engines' Constrain. Raises RequestError."""
        with self._lock:
            if self._grammars is None:
                assert self._tokenizer is not None
                self._grammars = Grammars(self._tokenizer)
        return self._grammars.constrain(grammar)

    def _parts(self, chosen: Selection) -> tuple[DeviceWeights, Tokenizer]:
        with self._lock:
            name = chosen.backend.name
            if name not in self._weights:
                self._weights[name] = DeviceWeights(chosen.model.load(), chosen.backend.device())
            if self._tokenizer is None:
                self._tokenizer = Tokenizer.of_model(chosen.model.folder)
            return self._weights[name], self._tokenizer
