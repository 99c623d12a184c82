"""From settings to a model, a library and a runner. Knows model, compiler and runtime.

Used by the engines' process, and by the commands that work without one.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from profiles import Profile, ProfileError, load_profile
from serve.backends import Backend, get_backend
from serve.compiler.cache import LibraryCache, default_cache_dir
from serve.compiler.compile import Compiled, CompileJob, get_library
from serve.compiler.library import Library
from serve.config import Settings
from serve.engine.constraint import Constraint
from serve.engine.host import Prepared
from serve.errors import LoadError
from serve.grammar import Grammars
from serve.memory import Claims, Parts, Variant, available_bytes, resident_bytes
from serve.model.source import ModelSource, find_model
from serve.placement import LibraryFacts, LoadRequest
from serve.runtime.config import RunnerConfig
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


def check_threads(config: RunnerConfig) -> None:
    """More than CPUs are of no use, and very many never get to work. Raises LoadError."""
    most = os.cpu_count() or 1
    if config.threads is not None and config.threads > most:
        raise LoadError(
            f"runner.threads = {config.threads}: expected at most {most}, this machine's CPUs"
        )


class _Layout(NamedTuple):
    """How weights lie in memory, which all libraries of a backend share that take them so."""

    panel: int | None  # None: not packed


@dataclass(frozen=True, eq=False)
class _Need:
    """What a library takes of the host's memory, in bytes."""

    model: str
    backend: str
    weights: int = 0
    kv_cache: int = 0
    step: int = 0  # activations, and the logits of every token

    @classmethod
    def of(cls, chosen: Selection, settings: Settings) -> _Need:
        model, backend, runner = chosen.model, chosen.backend, settings.runner
        if backend.family != "cpu":
            return cls(model.name, backend.name)
        config, engine = model.config, settings.engine
        running = min(engine.max_running, runner.max_batch) * (1 + engine.speculative_tokens)
        most = runner.step_tokens_for(config.n_positions)
        tokens = min(most, engine.prefill_chunk_tokens + running)
        width = config.vocab_size + config.n_inner + 4 * config.n_embd
        return cls(
            model.name,
            backend.name,
            4 * config.num_parameters,
            runner.kv_tokens_for(config.n_positions) * config.kv_bytes_per_token(),
            4 * tokens * width,
        )

    def parts(self, layout: _Layout | None) -> Parts:
        return {Variant(self.backend, layout): self.weights, self: self.kv_cache + self.step}


class Loader:
    """Makes engines' parts, for one model: its weights are read once, whatever the profiles."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: ModelSource | None = None
        self._tokenizer: Tokenizer | None = None
        self._grammars: Grammars | None = None  # made when first asked for
        self._weights: dict[str, DeviceWeights] = {}  # by backend
        self._claims = Claims(available_bytes, resident_bytes)

    def prepare(self, request: LoadRequest, report: Say) -> Prepared:
        """Compile if need be, and load. Raises ServeError."""
        settings = request.settings
        check_threads(settings.runner)
        try:
            chosen = self._select(settings, request)
        except ProfileError as error:
            raise LoadError(str(error)) from error
        chosen.backend.device()  # raises BackendError for what this machine cannot run
        need = _Need.of(chosen, settings)
        try:
            self._claim_memory(need)
            compiled = chosen.compile(settings, report)
            manifest = compiled.library.manifest
            report(f"library {manifest.digest[:12]} ({compiled.source}, {compiled.seconds:.1f} s)")
            start = time.perf_counter()
            panel = manifest.panel if manifest.packed else None
            self._claim_memory(need, _Layout(panel))
            runner = self._runner(chosen, compiled.library, settings.runner)
        except BaseException:
            self._claims.end(need)
            raise
        weakref.finalize(runner, self._claims.end, need)
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

    def _runner(self, chosen: Selection, library: Library, config: RunnerConfig) -> TVMRunner:
        weights, tokenizer = self._parts(chosen)
        try:
            return TVMRunner(library, weights, chosen.backend, config, tokenizer.vocab_size)
        except (MemoryError, OSError) as error:
            what = f"{chosen.backend.name}:{chosen.profile.name}"
            raise LoadError(f"out of memory for {what}: {error}; {_WHAT_TO_LOWER}") from error

    def _claim_memory(self, need: _Need, layout: _Layout | None = None) -> None:
        """Before compiling nobody knows the weights' layout, which is None. Raises LoadError."""
        parts = need.parts(layout)
        if not self._claims.claim(need, parts):
            raise self._too_large(need, parts)

    def _too_large(self, need: _Need, parts: Parts) -> LoadError:
        weights = self._claims.new({part: parts[part] for part in parts if part != need})
        free, promised = self._claims.room() or (0, 0)
        others = f", of which other libraries may take {promised >> 20} MiB" if promised else ""
        return LoadError(
            f"out of memory: {need.model} needs {weights >> 20} MiB for its weights, "
            f"{need.kv_cache >> 20} MiB for its KV cache and {need.step >> 20} MiB for a step, and "
            f"{free >> 20} MiB are free{others}; {_WHAT_TO_LOWER}"
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
