"""The composition root: the one file that knows everybody.

Model, library, runner, engine, app, server.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from profiles import Profile, load_profile
from serve.api.app import ServedModel, ServedModels, create_app
from serve.backends import Backend, get_backend
from serve.compiler.cache import LibraryCache, default_cache_dir
from serve.compiler.compile import Compiled, CompileJob, get_library
from serve.config import Settings
from serve.engine import Engine
from serve.errors import ConfigError
from serve.metrics import EngineMetrics, Registry, render
from serve.model.source import ModelSource, find_model
from serve.runtime.runner import TVMRunner
from serve.runtime.weights import DeviceWeights
from serve.tokenizer import Tokenizer

PROMPT = "Four score and seven years ago"
Say = Callable[[str], None]


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


def load_tokenizer(model: ModelSource, say: Say) -> Tokenizer:
    """The model's own tokenizer, or GPT-2's."""
    names = ("tokenizer.json", "vocab.json", "vocab.bpe")
    folder = model.folder
    if folder is not None and any((folder / name).exists() for name in names):
        tokenizer = Tokenizer.from_folder(folder)
    else:
        tokenizer = Tokenizer.bundled()
    if tokenizer.vocab_size > model.config.vocab_size:
        say(
            f"WARNING: {model.spec} has {model.config.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}: text that needs one of the others is refused"
        )
    return tokenizer


def load_model(chosen: Selection, settings: Settings, registry: Registry, say: Say) -> ServedModel:
    """Compile, load, and start the engine."""
    model, backend, profile = chosen.model, chosen.backend, chosen.profile
    device = backend.device()
    tokenizer = load_tokenizer(model, say)
    compiled = chosen.compile(settings, say)
    library = compiled.library
    say(f"library {library.manifest.digest[:12]} ({compiled.source}, {compiled.seconds:.1f} s)")
    start = time.perf_counter()
    runner = TVMRunner(
        library,
        DeviceWeights(model.load(), device),
        backend,
        settings.runner,
        tokenizer.vocab_size,
    )
    say(f"weights of {model.spec} loaded ({time.perf_counter() - start:.1f} s)")
    name = settings.model.name or model.name
    metrics = EngineMetrics(
        registry,
        name,
        backend.name,
        profile.name,
        gauges=lambda: engine.gauges(),
        window_seconds=settings.metrics.window_seconds,
    )
    engine = Engine(runner, settings.engine, metrics)
    manifest = library.manifest
    metrics.on_library(
        compiled.source,
        manifest.quantization,
        manifest.digest,
        manifest.tvm_version,
        compile_seconds=manifest.compile_seconds,
    )
    engine.start()
    return ServedModel(
        name=name,
        aliases=_aliases(name, model.spec, backend.name, profile.name),
        backend=backend.name,
        profile=profile.name,
        quantization=manifest.quantization,
        max_context=runner.limits.max_context,
        digest=manifest.digest,
        created=int(time.time()),
        tokenizer=tokenizer,
        engine=engine,
        on_rejected=metrics.on_rejected,
    )


def _aliases(name: str, spec: str, backend: str, profile: str) -> tuple[str, ...]:
    aliases = (f"{name}@{profile}", f"{name}@{backend}:{profile}")
    return aliases if spec == name or Path(spec).is_dir() else (*aliases, spec)


class Server(uvicorn.Server):
    """uvicorn, draining on the first SIGTERM or SIGINT and ending at once on the second."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_drain = on_drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            self.force_exit = True
            return
        self._on_drain()
        self.should_exit = True


def run(settings: Settings, say: Say) -> None:
    """Serve until a signal ends it. Raises ServeError or ProfileError if it cannot start."""
    server = settings.server
    chosen = select(settings)
    sock = listen(server.host, server.port)  # before the long part: a taken port is told at once
    try:
        registry = Registry()
        served = ServedModels([load_model(chosen, settings, registry, say)])
        app = create_app(served, lambda: render(registry), observe_http=registry.observe_http)
        sock.listen(2048)
        sock.setblocking(False)
        _announce(served, server.host, sock.getsockname()[1], chosen.model.is_noise, say)
        config = _uvicorn_config(app, server.drain_seconds)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(_serve(config, served, sock, server.drain_seconds))
    finally:
        sock.close()
    say("stopped")


def _uvicorn_config(app: FastAPI, drain_seconds: float) -> uvicorn.Config:
    longest = math.ceil(drain_seconds) + 1  # the engine ends what is left a second earlier
    return uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=longest)


async def _serve(
    config: uvicorn.Config, served: ServedModels, sock: socket.socket, drain_seconds: float
) -> None:
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def drain(seconds: float = drain_seconds) -> None:
        drains.extend(loop.create_task(model.engine.drain(seconds)) for model in served)

    server = Server(config, lambda: loop.call_soon_threadsafe(drain))
    await server.serve(sockets=[sock])
    if server.force_exit:  # the second signal: whatever still runs is cancelled
        drain(0)
        await server.lifespan.shutdown()  # which uvicorn leaves out then
    elif not drains:  # uvicorn ended by itself
        drain()
    await asyncio.gather(*drains)


def _announce(served: ServedModels, host: str, port: int, is_noise: bool, say: Say) -> None:
    """What is served, where, and a command that shows it."""
    [model] = served
    url_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        host, f"[{host}]" if ":" in host else host
    )
    url = f"http://{url_host}:{port}"
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 320, "temperature": 0}
    say(f"serving {model.name} ({', '.join(model.aliases)}) at {url}")
    if is_noise:
        say("WARNING: these weights are random: the text is noise, only the speed means something")
    if host not in ("127.0.0.1", "::1", "localhost"):
        say(f"WARNING: listening on {host} without api keys: whoever reaches it can use it")
    say("try it:")
    header = "-H 'Content-Type: application/json'"
    say(f"  curl {url}/v1/completions {header} -d '{json.dumps(body)}'")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening. Raises ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        expected = f"an address that is free on this machine ({error.strerror or error})"
        raise ConfigError("settings", "server.host:port", f"{host}:{port}", expected) from None
    return sock
