"""Models, health, readiness, version, metrics; request ids and the measurement of requests."""

from __future__ import annotations

import asyncio

import pytest

from serve.api.app import ServedModels, create_app
from serve.errors import ModelError, ModelNotFoundError
from tests.api.conftest import PATIENCE, SPEECH, Server, running, speaking

pytestmark = pytest.mark.api


def test_models_say_what_they_run_on(server: Server) -> None:
    listed = server.get("/v1/models").json()
    assert listed["object"] == "list"
    card = {
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "dlight-serve",
        "root": "gettysburg",
        "backend": "cpu",
        "profile": "full",
        "quantization": "none",
        "digest": "sha256:0123",
        "max_model_len": 256,
    }
    names = ("gettysburg", "gettysburg@full", "gettysburg@cpu:full")
    assert listed["data"] == [{"id": name, **card} for name in names]
    assert server.get("/v1/models/gettysburg@cpu:full").json() == listed["data"][2]
    assert server.get("/v1/models/gettysburg%40cpu%3Afull").json() == listed["data"][2]


def test_served_models() -> None:
    with running(speaking(SPEECH)) as server:
        [model] = server.models
        assert server.models.find("gettysburg@full") is model
        with pytest.raises(ModelNotFoundError):
            server.models.find("gettysburg@gemv")
        with pytest.raises(ModelError, match="two libraries"):
            ServedModels([model, model])


def test_healthy_and_ready(server: Server) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 200


def test_draining_is_not_ready() -> None:
    with running(speaking(SPEECH)) as server:
        asyncio.run(server.engine.drain(PATIENCE))
        assert server.get("/ready").status_code == 503
        refused = server.post()
        assert refused.status_code == 503
        assert server.rejections == 1


def test_a_dead_engine_is_not_healthy() -> None:
    with running(speaking(SPEECH)) as server:
        server.runner.failure = SystemExit("the device is gone")
        assert server.post().status_code == 503
        assert server.get("/health").status_code == 503
        assert server.get("/ready").status_code == 503
        assert server.post().status_code == 503


def test_no_model_is_not_ready() -> None:
    models = ServedModels()
    assert (models.is_alive, models.is_ready) == (True, False)
    assert create_app(models, lambda: (b"", "text/plain")).version != ""


def test_version_and_metrics(server: Server) -> None:
    assert server.get("/version").json() == {"version": "1.2.3", "tvm": "0.27"}
    metrics = server.get("/metrics")
    assert metrics.text == "up 1\n"
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("sane", ["a", "A-b_c.9", "x" * 128])
def test_a_sane_request_id_is_kept(server: Server, sane: str) -> None:
    for path in ("/health", "/nowhere"):
        assert server.get(path, headers={"x-request-id": sane}).headers["x-request-id"] == sane


@pytest.mark.parametrize("insane", ["", "x" * 129, "a b", "a;b", "<script>", "é".encode()])
def test_any_other_is_replaced(server: Server, insane: str | bytes) -> None:
    answer = server.get("/health", headers={"x-request-id": insane})
    assert len(answer.headers["x-request-id"]) == 32
    assert answer.headers["x-request-id"] != server.get("/health").headers["x-request-id"]


def test_streams_have_an_id_too(server: Server) -> None:
    assert len(server.post(stream=True).headers["x-request-id"]) == 32


def test_requests_are_measured_by_route() -> None:
    with running(speaking(SPEECH)) as server:
        server.post()
        server.post(stream=True)
        server.post(nonsense=1)
        server.get("/v1/models/gettysburg@full")
        server.get("/v1/models/nothing")
        server.get("/no/such/route")
        server.get("/v1/completions")
        server.get("/openapi.json")
        seen = [server.http.get(timeout=PATIENCE) for _ in range(8)]
    assert [(route, status) for route, status, _ in seen] == [
        ("/v1/completions", 200),
        ("/v1/completions", 200),
        ("/v1/completions", 400),
        ("/v1/models/{name:path}", 200),
        ("/v1/models/{name:path}", 404),
        ("unknown", 404),
        ("/v1/completions", 405),
        ("/openapi.json", 200),
    ]
    assert all(seconds > 0 for _, _, seconds in seen)
