"""Who may come in: with which key, from where; and what each refusal says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from serve.api.auth import Keys, is_local, is_loopback
from tests.api.conftest import PATIENCE, SPEECH, Server, request, running, speaking

pytestmark = pytest.mark.api

ALICE, BOB, ADMIN = "sk-alice-0123", "sk-bob-4567", "sk-admin-89ab"


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    with running(speaking(SPEECH), api_keys=Keys([ALICE, BOB]), admin_keys=Keys([ADMIN])) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys() -> None:
    keys = Keys([ALICE, BOB])
    assert bool(keys)
    assert not Keys()
    fingerprints = {keys.find(ALICE.encode()), keys.find(BOB.encode())}
    assert len(fingerprints - {None}) == 2
    assert all(key not in (ALICE, BOB) and len(str(key)) == 8 for key in fingerprints)
    for wrong in (b"", b"sk", ALICE[:-1].encode(), f"{ALICE}x".encode(), b"\xff"):
        assert keys.find(wrong) is None
    assert ALICE not in repr(vars(keys))


@pytest.mark.parametrize("key", [ALICE, BOB])
def test_a_right_key(locked: Server, key: str) -> None:
    answer = httpx.post(
        f"{locked.url}/v1/completions", json=request(), headers=bearer(key), timeout=PATIENCE
    )
    assert answer.status_code == 200
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)
    assert client.models.list().data[0].id == "gettysburg"


WRONG: list[Sequence[tuple[str, str]]] = [
    [],
    [("authorization", "")],
    [("authorization", "Bearer")],
    [("authorization", "Bearer sk-alice")],
    [("authorization", f"Basic {ALICE}")],
    [("authorization", ALICE)],
    [("authorization", f"Bearer {ALICE}, Bearer {BOB}")],
    [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {ALICE}")],
    [("x-api-key", ALICE)],
    [("authorization", f"Bearer {ADMIN}")],
]


@pytest.mark.parametrize("headers", WRONG)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/openapi.json"),
        ("OPTIONS", "/v1/completions"),
        ("GET", "/nowhere"),
        ("GET", "/health/"),
        ("GET", "//health"),
    ],
)
def test_no_key_or_a_wrong_one(
    locked: Server, method: str, path: str, headers: Sequence[tuple[str, str]]
) -> None:
    answer = httpx.request(method, locked.url + path, headers=list(headers), timeout=PATIENCE)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in answer.headers
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert ALICE not in answer.text


def test_openai_knows_the_error(locked: Server) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="sk-wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as found:
        client.models.list()
    assert found.value.code == "invalid_api_key"


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics"])
def test_what_anybody_may_ask(locked: Server, path: str) -> None:
    assert locked.get(path).status_code == 200
    assert locked.get(path, headers=bearer("wrong")).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_has_no_case(locked: Server, scheme: str) -> None:
    headers = {"authorization": f"{scheme}  {ALICE}"}
    assert locked.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/admin", "/admin/models/load", "/%61dmin/x"])
def test_administration_needs_a_key_of_its_own(locked: Server, path: str) -> None:
    for headers in ({}, bearer(ALICE), bearer("wrong")):
        assert locked.get(path, headers=headers).status_code == 401
    assert locked.get(path, headers=bearer(ADMIN)).status_code == 404  # there is none here


def test_refused_requests_are_counted() -> None:
    reasons: list[str] = []
    with running(speaking(SPEECH), api_keys=Keys([ALICE]), on_rejected=reasons.append) as server:
        server.get("/v1/models")
        server.get("/v1/models", headers=bearer(ALICE))
        server.get("/health")
        server.get("/admin/x", headers={"origin": "https://evil.example"})
    assert reasons == ["invalid_key", "not_local"]


# -- administration without admin keys


def test_without_admin_keys_this_machine_may(server: Server) -> None:
    assert server.get("/admin/x").status_code == 404
    for header in (
        {"host": "evil.example"},  # a name that was rebound to our address
        {"origin": "http://evil.example"},  # a page in this machine's browser
        {"origin": "null"},
        {"x-forwarded-for": "127.0.0.1"},  # through a proxy on this machine
        {"forwarded": "for=127.0.0.1"},
        {"via": "1.1 proxy"},
    ):
        answer = server.get("/admin/x", headers=header)
        assert answer.status_code == 403, header
        assert answer.json()["error"]["code"] == "local_only"
        assert server.get("/v1/models", headers=header).status_code == 200


def scope(client: Any, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "client": client, "headers": list(headers)}


@pytest.mark.parametrize(
    ("client", "host", "expected"),
    [
        ("127.0.0.1", b"127.0.0.1:8000", True),
        ("127.0.0.1", b"localhost", True),
        ("127.8.9.1", b"LOCALHOST:1", True),
        ("::1", b"[::1]:8000", True),
        ("::ffff:127.0.0.1", b"localhost:8000", True),
        ("10.0.0.1", b"127.0.0.1:8000", False),
        ("::ffff:10.0.0.1", b"localhost", False),
        ("fe80::1%eth0", b"localhost", False),
        ("127.0.0.1", b"10.0.0.1:8000", False),
        ("127.0.0.1", b"localhost.evil.example", False),
        ("127.0.0.1", b"127.0.0.1.evil.example", False),
        ("127.0.0.1", b"", False),
        ("127.0.0.1", b"\xff", False),
        ("", b"localhost", False),
    ],
)
def test_is_local(client: str, host: bytes, expected: bool) -> None:
    assert is_local(scope((client, 5), (b"host", host))) is expected


def test_is_local_needs_a_client_and_one_host() -> None:
    good = (b"host", b"localhost")
    assert is_local(scope(("127.0.0.1", 5), good))
    assert not is_local(scope(None, good))
    assert not is_local(scope(("127.0.0.1", 5)))
    assert not is_local(scope(("127.0.0.1", 5), good, good))


def test_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


# -- web pages


def test_cors_is_off(server: Server) -> None:
    origin = {"origin": "https://app.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{server.url}/v1/completions", headers=origin, timeout=PATIENCE)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_where_it_is_set() -> None:
    keys, origins = Keys([ALICE]), ["https://app.example"]
    with running(speaking(SPEECH), api_keys=keys, cors_origins=origins) as server:
        origin = {"origin": "https://app.example"}
        ask = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, x-stainless-os",
        }
        url = f"{server.url}/v1/completions"
        preflight = httpx.options(url, headers=origin | ask, timeout=PATIENCE)  # has no key
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        assert "x-request-id" in preflight.headers
        for key, status in ((ALICE, 200), ("wrong", 401)):  # the page may read the error, too
            answer = server.get("/v1/models", headers=origin | bearer(key))
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = {"origin": "https://evil.example"}
        refused = httpx.options(url, headers=other | ask, timeout=PATIENCE)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "origin"
        answer = server.get("/v1/models", headers=other | bearer(ALICE))
        assert "access-control-allow-origin" not in answer.headers
