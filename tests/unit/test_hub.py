"""Models from the hub, against a stand-in for it on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars

from serve.errors import ModelError
from serve.model.checkpoint import Checkpoint
from serve.model.hub import HubConfig, fetch
from serve.model.source import find_model
from tests.models import write_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("hub")]

REPO, TOKEN = "someone/toy", "hf_secret"
MAIN, OLD = "a" * 40, "b" * 40  # commits
API = re.compile(r"/api/models/(?P<repo>.+)/(?P<what>revision|tree)/(?P<revision>[^/]+)")
FILE = re.compile(r"/(?P<repo>.+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Hub(ThreadingHTTPServer):
    """One model, in two commits. Set the attributes to make it fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs = {"main": MAIN, "v1": OLD}
        self.token: str | None = None
        self.error: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.drop_after: int | None = None  # bytes of a file, then the connection ends
        self.hang_up = False
        self.requests: list[str] = []

    def serve(self, folder: Path, commit: str = MAIN) -> None:
        self.commits[commit] = {p.name: p.read_bytes() for p in folder.iterdir()}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves is none."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if self.server.hang_up:
            self.close_connection = True
        elif self.server.error is not None:
            self.refuse(*self.server.error)
        elif self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self.refuse(401, "RepoNotFound")
        elif match := API.fullmatch(path) or FILE.fullmatch(path):
            self.answer(match)
        else:
            self.refuse(404, "")

    do_HEAD = do_GET  # noqa: N815

    def answer(self, match: re.Match[str]) -> None:
        commit = self.server.refs.get(match["revision"], match["revision"])
        if match["repo"] != REPO:
            self.refuse(404, "RepoNotFound")
        elif commit not in self.server.commits:
            self.refuse(404, "RevisionNotFound")
        elif match.re is FILE:
            self.send_file(commit, self.server.commits[commit].get(match["path"]))
        elif match["what"] == "tree":
            files = self.server.commits[commit].items()
            self.send_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                    for name, data in files
                ]
            )
        else:
            self.send_json({"id": REPO, "sha": commit})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"", {"X-Error-Code": code} if code else {})

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, commit: str, data: bytes | None) -> None:
        if data is None:
            self.refuse(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{oid(data)}"', "X-Repo-Commit": commit}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            self.send(200, data, headers)
        else:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.send(206, data[first:], headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.server.drop_after
        if limit is not None and "ETag" in headers and len(body) > limit:
            self.close_connection = True
            body = body[:limit]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    new = write_model(root / "new", vocab_size=50, n_embd=16, n_layer=1, num_shards=2)
    (new / "vocab.json").write_text("{}")
    (new / "pytorch_model.bin").write_bytes(b"not wanted")
    (new / "README.md").write_text("not wanted")
    return {"new": new, "old": write_model(root / "old", vocab_size=40, n_embd=16, n_layer=1)}


@pytest.fixture
def hub(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, as huggingface_hub's endpoint; no token, and no wait between attempts."""
    server = Hub()
    server.serve(folders["new"], MAIN)
    server.serve(folders["old"], OLD)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    huggingface_hub.close_session()
    disable_progress_bars()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


Get = Callable[..., Path]


@pytest.fixture
def get(tmp_path: Path) -> Get:
    """Fetch the model, with a cache of the test's own."""

    def fetch_with(repo: str = REPO, **options: object) -> Path:
        return fetch(repo, HubConfig(cache_dir=str(tmp_path / "cache"), **options))  # type: ignore[arg-type]

    return fetch_with


def test_downloads_what_serving_needs_and_no_more(get: Get, folders: dict[str, Path]) -> None:
    folder = get()
    names = {path.name for path in folder.iterdir()}
    wanted = {path.name for path in folders["new"].iterdir()} - {"pytorch_model.bin", "README.md"}
    assert names == wanted
    for name in names:
        assert (folder / name).read_bytes() == (folders["new"] / name).read_bytes()


def test_a_model_by_its_id(tmp_path: Path) -> None:
    model = find_model(REPO, HubConfig(cache_dir=str(tmp_path)))
    assert (model.name, model.config.vocab_size, model.is_noise) == (REPO, 50, False)
    weights = model.load()
    assert isinstance(weights, Checkpoint)
    assert weights["transformer.wte.weight"].shape == (50, 16)


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision(get: Get, folders: dict[str, Path], revision: str) -> None:
    config = (get(revision=revision) / "config.json").read_text()
    assert config == (folders["old"] / "config.json").read_text()


def test_no_such_revision(get: Get) -> None:
    with pytest.raises(ModelError, match=r"'someone/toy' at 'v9': no such revision"):
        get(revision="v9")


def test_no_such_model(get: Get) -> None:
    with pytest.raises(ModelError, match=r"hub model 'someone/else': no such model, or it is priv"):
        get("someone/else")


def test_not_an_id(get: Get) -> None:
    with pytest.raises(ModelError, match=r"'some one': neither a folder nor a hub id"):
        get("some one")


def test_a_private_model_needs_its_token(hub: Hub, get: Get) -> None:
    hub.token = TOKEN
    for wrong in (None, "hf_wrong"):
        with pytest.raises(ModelError, match=r"it is private and needs a token") as caught:
            get(token=wrong)
        assert "hf_wrong" not in str(caught.value)
    assert (get(token=TOKEN) / "config.json").exists()


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(HubConfig(token=TOKEN))


def test_the_token_from_the_environment(
    hub: Hub, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (get() / "config.json").exists()


def test_a_gated_model(hub: Hub, get: Get) -> None:
    hub.error = (403, "GatedRepo")
    with pytest.raises(ModelError, match=r"access is restricted; give a token that has it"):
        get()


@pytest.mark.parametrize("status", [500, 503, 429])
def test_the_hub_is_down(hub: Hub, get: Get, status: int) -> None:
    hub.error = (status, "")
    with pytest.raises(ModelError, match=rf"hub model 'someone/toy': .*{status}"):
        get()


def test_the_hub_hangs_up(hub: Hub, get: Get) -> None:
    hub.hang_up = True
    with pytest.raises(ModelError, match=r"hub model 'someone/toy': "):
        get()


def test_nothing_listens(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"not in the cache, and the hub was not reached"):
        get()


def test_the_cache_spares_the_second_download(hub: Hub, get: Get) -> None:
    first = get()
    hub.requests.clear()
    assert get() == first
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_offline_uses_the_cache_and_asks_nobody(hub: Hub, get: Get) -> None:
    first = get()
    hub.requests.clear()
    assert get(offline=True) == first
    assert hub.requests == []


def test_offline_by_the_environment_variable(
    hub: Hub, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = get()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # HF_HUB_OFFLINE=1, read at import
    assert get() == first
    assert hub.requests == []


def test_offline_without_a_cache(hub: Hub, get: Get) -> None:
    with pytest.raises(ModelError, match=r"'someone/toy': not in the cache, and .*offline"):
        get(offline=True)
    assert hub.requests == []


def test_the_cache_helps_when_the_hub_is_gone(hub: Hub, get: Get) -> None:
    first = get()
    hub.error = (503, "")
    assert get() == first


def test_an_interrupted_download_is_an_error_and_can_be_resumed(hub: Hub, get: Get) -> None:
    hub.drop_after = 100
    hub.commits[MAIN] = {"config.json": b"{}", "model.safetensors": bytes(100_000)}
    with pytest.raises(ModelError, match=r"'someone/toy': the download failed"):
        get()
    with pytest.raises(ModelError, match=r"not in the cache"):
        get(offline=True)
    hub.drop_after = None
    assert (get() / "model.safetensors").read_bytes() == bytes(100_000)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"'someone/toy': the download failed: .*file"):
        fetch(REPO, HubConfig(cache_dir=str(tmp_path / "file")))


REPORT = """
from serve.errors import ModelError
from serve.model.source import find_model
try:
    print(find_model("someone/toy").folder)
except ModelError as error:
    print(error)
"""


def test_the_environment_is_huggingface_hubs(hub: Hub, tmp_path: Path) -> None:
    """It reads these variables when it is imported."""
    hub.token = TOKEN

    def find(**more: str) -> str:
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN} | more
        result = subprocess.run(
            [sys.executable, "-c", REPORT],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.strip()

    assert "not in the cache" in find(HF_HUB_OFFLINE="1")
    assert hub.requests == []
    folder = find()
    assert folder == str(tmp_path / "hub" / "models--someone--toy" / "snapshots" / MAIN)
    hub.requests.clear()
    assert find(HF_HUB_OFFLINE="1") == folder
    assert hub.requests == []


def test_a_repository_without_a_config(hub: Hub, tmp_path: Path) -> None:
    hub.commits[MAIN] = {"README.md": b"nothing to serve"}
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        find_model(REPO, HubConfig(cache_dir=str(tmp_path)))
