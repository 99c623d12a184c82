"""The server's composition root: model, engines' process, app, HTTP. It has no TVM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import signal
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from serve.api.app import ServedModels, create_app
from serve.api.auth import Keys, is_loopback
from serve.chat_template import chat_template
from serve.config import Settings
from serve.deployment import Deployment
from serve.engine.remote import HostProcess
from serve.errors import ConfigError, EngineError, ServeError
from serve.grammar import Grammars
from serve.libraries import Libraries, ModelFacts
from serve.metrics import Registry, render
from serve.model.source import ModelSource, find_model
from serve.protocol import Protocol
from serve.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_DEATH_SECONDS = 2.0  # that connections get when the engines are dead
PROMPT = "Four score and seven years ago"
Say = Callable[[str], None]


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


def run(
    settings: Settings, host: HostProcess, read_settings: Callable[[], Settings], say: Say
) -> None:
    """Serve until a signal ends it. Raises ServeError if it cannot start, or its engines die.

    host: the engines' process, which is ended in any case. read_settings: reads them again, on
    SIGHUP and POST /admin/reload.
    """
    try:
        _start(settings, host, read_settings, say)
    finally:
        host.kill()
    say("stopped")


def _start(
    settings: Settings, host: HostProcess, read_settings: Callable[[], Settings], say: Say
) -> None:
    server = settings.server
    # What can be wrong is told at once, before the long part.
    server.check_tls()
    keys = settings.auth.read_api_keys(), settings.auth.read_admin_keys()
    model = find_model(settings.model.source, settings.hub)
    facts = _model_facts(model, settings, say)
    sock = bind(server.host, server.port)
    with sock:
        loop_factory = uvicorn.Config("", log_config=None).get_loop_factory()
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_run(settings, keys, host, read_settings, facts, sock, say))


async def _run(
    settings: Settings,
    keys: tuple[Keys, Keys],
    host: HostProcess,
    read_settings: Callable[[], Settings],
    model: ModelFacts,
    sock: socket.socket,
    say: Say,
) -> None:
    registry, loop = Registry(), asyncio.get_running_loop()
    registry.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
    deaths: list[str] = []
    servers: list[Server] = []

    def on_death(message: str) -> None:
        """Whoever waited has been told; a client that does not listen is not waited for."""
        deaths.append(message)
        for server in servers:
            server.should_exit = True
            loop.call_later(_DEATH_SECONDS, setattr, server, "force_exit", True)

    libraries = Libraries(settings, model, registry, say, on_death, host)
    deployment = Deployment(settings, model.name, libraries, read_settings)
    _reload_on_hangup(deployment, say)
    try:
        await deployment.start()
        app = create_app(
            libraries.served,
            lambda: render(registry),
            observe_http=registry.observe_http,
            versions=_versions(),
            limits=settings.limits,
            api_keys=keys[0],
            admin_keys=keys[1],
            cors_origins=settings.server.cors_origins,
            log_prompts=settings.server.log_prompts,
            on_rejected=registry.on_rejected,
            admin=deployment,
        )
        _listen(sock, settings)
        _announce(libraries.served, settings, sock.getsockname()[1], say)
        await _serve(_uvicorn_config(settings, app), libraries, settings, sock, servers)
    finally:
        libraries.close()
    if deaths:
        raise EngineError(deaths[0])


async def _serve(
    config: uvicorn.Config,
    libraries: Libraries,
    settings: Settings,
    sock: socket.socket,
    servers: list[Server],
) -> None:
    loop = asyncio.get_running_loop()
    drains: list[asyncio.Task[None]] = []

    def drain(seconds: float = settings.server.drain_seconds) -> None:
        drains.append(loop.create_task(libraries.drain(seconds)))

    server = Server(config, lambda: loop.call_soon_threadsafe(drain))
    servers.append(server)
    await server.serve(sockets=[sock])
    if server.force_exit:  # the second signal: whatever still runs is cancelled
        drain(0)
        await server.lifespan.shutdown()  # which uvicorn leaves out then
    elif not drains:  # uvicorn ended by itself
        drain()
    await asyncio.gather(*drains)


def _reload_on_hangup(deployment: Deployment, say: Say) -> None:
    """From now on; a reload waits until what the settings name is loaded."""
    loop = asyncio.get_running_loop()
    under_way: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            report = await deployment.reload()
        except ServeError as error:
            log.error("reload refused, nothing was changed: %s", error)
        else:
            loaded = ", ".join(x.name for x in report.libraries if x.state == "loaded")
            say(f"reloaded; changed: {', '.join(report.changed) or 'no setting'}; loaded: {loaded}")

    def on_hangup() -> None:
        task = loop.create_task(reload())
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    with contextlib.suppress(AttributeError, NotImplementedError):  # no such signal on Windows
        loop.add_signal_handler(signal.SIGHUP, on_hangup)


def _model_facts(model: ModelSource, settings: Settings, say: Say) -> ModelFacts:
    tokenizer = Tokenizer.of_model(model.folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        say(
            f"WARNING: {model.spec} has {model.config.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}: text that needs one of the others is refused"
        )
    if model.is_noise:
        say("WARNING: these weights are random: the text is noise, only the speed means something")
    name, template = settings.model.name or model.name, settings.model.chat_template
    is_name = model.spec == name or Path(model.spec).is_dir()
    return ModelFacts(
        name,
        () if is_name else (model.spec,),
        model.config.n_positions,
        tokenizer,
        Grammars(tokenizer),
        None if template is None else _read_template(template),
    )


def _read_template(file: str) -> str:
    try:
        source = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            "settings", "model.chat_template", file, f"a text file: {error}"
        ) from None
    chat_template(source)  # raises ModelError for what is no template
    return source


def _versions() -> dict[str, str]:
    """Of the server and of what it stands on."""
    names = {"version": "dlight-serve", "tvm": "apache-tvm"}
    return {key: metadata.version(name) for key, name in names.items()}


def _uvicorn_config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    server = settings.server
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_config=None,  # the command has set the logs up
        access_log=False,  # the app's own line says more
        proxy_headers=False,  # whoever connects is the client, whatever he says of himself
        server_header=False,
        timeout_keep_alive=server.keep_alive_seconds,
        # The engines end what is left a second earlier.
        timeout_graceful_shutdown=math.ceil(server.drain_seconds) + 1,
        ssl_certfile=server.tls_certificate,
        ssl_keyfile=server.tls_key,
    )


def _announce(served: ServedModels, settings: Settings, port: int, say: Say) -> None:
    """What is served, where, and a command that shows it."""
    host, model = settings.server.host, served.default
    assert model is not None
    url_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
        host, f"[{host}]" if ":" in host else host
    )
    scheme = "http" if settings.server.tls_certificate is None else "https"
    url = f"{scheme}://{url_host}:{port}"
    body = {"model": model.name, "prompt": PROMPT, "max_tokens": 320, "temperature": 0}
    others = [name for name in served.names if name != model.name]
    say(f"serving {model.name} ({', '.join(others)}) at {url}")
    if settings.auth.is_open and not is_loopback(host):
        say(f"WARNING: listening on {host} without api keys: whoever reaches it can use it")
    say("try it:")
    header = "-H 'Content-Type: application/json'"
    if not settings.auth.is_open:
        header += " -H 'Authorization: Bearer KEY'"
    say(f"  curl {url}/v1/completions {header} -d '{json.dumps(body)}'")


def bind(host: str, port: int) -> socket.socket:
    """A socket, not yet listening. Raises ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise _not_free(host, port, error) from None
    return sock


def _listen(sock: socket.socket, settings: Settings) -> None:
    """Raises ConfigError if somebody who was bound to the same address has begun before."""
    try:
        sock.listen(2048)
    except OSError as error:
        raise _not_free(settings.server.host, settings.server.port, error) from None
    sock.setblocking(False)


def _not_free(host: str, port: int, error: OSError) -> ConfigError:
    expected = f"an address that is free on this machine ({error.strerror or error})"
    return ConfigError("settings", "server.host:port", f"{host}:{port}", expected)
