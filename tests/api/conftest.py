"""A real server on a loopback port: the app under uvicorn in a thread, over a fake runner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import httpx
import pytest
import uvicorn

from serve.api.app import ServedModel, ServedModels, create_app
from serve.engine import Engine, EngineConfig, FinishEvent, NullObserver, Stream
from serve.grammar import Grammars
from serve.protocol import Protocol
from serve.tokenizer import Tokenizer
from tests.fakes import FakeRunner, scripted

TOKENIZER = Tokenizer.bundled()
GRAMMARS = Grammars(TOKENIZER)
SPEECH = "Four score and seven years ago our fathers brought forth a new nation"
PATIENCE = 60.0  # seconds after which a wait is a failure; no test measures time


class Finishes(NullObserver):
    """Keeps every FinishEvent for a test to wait for."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[FinishEvent] = queue.SimpleQueue()

    def on_finish(self, event: FinishEvent) -> None:
        self.events.put(event)

    def next(self) -> FinishEvent:
        return self.events.get(timeout=PATIENCE)


class Server:
    """A running server and everything behind it that a test may want to look at."""

    def __init__(
        self,
        runner: FakeRunner,
        config: EngineConfig | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        """`options`: of create_app, except that `uvicorn_options` are uvicorn's."""
        uvicorn_options = options.pop("uvicorn_options", {})
        self.runner, self.finishes = runner, Finishes()
        self.engine = Engine(runner, config, self.finishes, constrain=GRAMMARS.constrain)
        self.rejections = 0
        self.http: queue.SimpleQueue[tuple[str, int, float]] = queue.SimpleQueue()
        self.models = ServedModels([self._model(chat_template)])
        self.app = create_app(
            self.models,
            lambda: (b"up 1\n", "text/plain; version=0.0.4; charset=utf-8"),
            lambda *seen: self.http.put(seen),
            {"version": "1.2.3", "tvm": "0.27"},
            **options,
        )
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self.app,
                http=Protocol,
                ws="none",
                port=0,
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                **uvicorn_options,
            )
        )
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)
        self._pool = ThreadPoolExecutor(4)
        self.url = ""

    def _model(self, chat_template: str | None) -> ServedModel:
        return ServedModel(
            name="gettysburg",
            aliases=("gettysburg@full", "gettysburg@cpu:full"),
            backend="cpu",
            profile="full",
            quantization="none",
            max_context=self.runner.limits.max_context,
            digest="sha256:0123",
            created=1_700_000_000,
            tokenizer=TOKENIZER,
            engine=self.engine,
            on_rejected=self._count_rejection,
            chat_template=chat_template,
            grammars=GRAMMARS,
        )

    def _count_rejection(self, reason: str) -> None:  # noqa: ARG002
        self.rejections += 1

    def start(self) -> None:
        self.engine.start()
        self._thread.start()
        until(lambda: self._uvicorn.started)
        host, port = self._uvicorn.servers[0].sockets[0].getsockname()
        self.url = f"http://{host}:{port}"

    def stop(self) -> None:
        self.runner.gate.set()
        self._uvicorn.should_exit = True
        self._thread.join(PATIENCE)
        self._pool.shutdown()
        asyncio.run(self.engine.drain(PATIENCE))

    def post(self, **fields: Any) -> httpx.Response:
        """POST /v1/completions, with a model unless one is given."""
        return self.post_to("/v1/completions", **request(**fields))

    def chat(self, *texts: str, **fields: Any) -> httpx.Response:
        """POST /v1/chat/completions: what user and assistant said in turns, or `messages`."""
        roles = ("user", "assistant")
        said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        body = {"model": "gettysburg", "messages": said, "temperature": 0, **fields}
        return self.post_to("/v1/chat/completions", **body)

    def post_to(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE)

    def post_later(self, **fields: Any) -> Future[httpx.Response]:
        """The same in a thread of its own."""
        return self._pool.submit(self.post, **fields)

    def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed completion, which must end with [DONE]."""
        return chunks_of(self.post(stream=True, **fields))

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE, **kwargs)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event tells of."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Those of a stream that has gone well."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def request(**fields: Any) -> dict[str, Any]:
    """A small valid request, with `fields` changed."""
    return {"model": "gettysburg", "prompt": "Four", "temperature": 0, **fields}


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def speaking(*texts: str, **kwargs: Any) -> FakeRunner:
    """A runner that continues the beginnings of these texts."""
    lines = [encode(text) for text in texts]
    return FakeRunner(next_token=scripted(TOKENIZER.eos_token_id, *lines), **kwargs)


@contextlib.contextmanager
def running(
    runner: FakeRunner, config: EngineConfig | None = None, **options: Any
) -> Iterator[Server]:
    server = Server(runner, config, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Says SPEECH, and ends anything else at once. Tests must leave its runner as it is."""
    with running(speaking(SPEECH)) as started:
        yield started


@pytest.fixture
def cancels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Wait for the next Stream.cancel() or .stop()."""
    called: queue.SimpleQueue[None] = queue.SimpleQueue()
    cancel, stop = Stream.cancel, Stream.stop

    def tell_cancel(stream: Stream, *reason: Literal["cancelled", "timeout"]) -> None:
        cancel(stream, *reason)
        called.put(None)

    def tell_stop(stream: Stream, num_generated: int) -> None:
        stop(stream, num_generated)
        called.put(None)

    monkeypatch.setattr(Stream, "cancel", tell_cancel)
    monkeypatch.setattr(Stream, "stop", tell_stop)
    return lambda: called.get(timeout=PATIENCE)
