"""Who may come in, and how often. Knows keys and addresses, and nothing of the endpoints' work."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api import access
from serve.api.limits import RateLimiter
from serve.errors import InvalidKeyError, LocalOnlyError, OverloadedError

OPEN = frozenset({"/health", "/ready", "/version", "/metrics"})  # anybody, at any rate
ADMIN = "/admin"

# Of a request that came through somebody else, whose own address tells nothing.
_FORWARDED = {b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip"}


class Keys:
    """Keys that are known by their SHA-256 alone."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, key: bytes) -> str | None:
        """The fingerprint of the key if it is one of these; in the same time if it is not."""
        digest = sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:8] if any(matches) else None


class Gate:
    """Lets a request to the app, or raises InvalidKeyError, LocalOnlyError or OverloadedError.

    Whatever is neither open nor administration needs one of `api_keys`, if there are any, and
    counts for the rate. Administration needs one of `admin_keys`; without those it is for this
    machine alone. `on_rejected` is told the error's reason.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Keys,
        admin_keys: Keys,
        limiter: RateLimiter | None,
        on_rejected: Callable[[str], None],
    ) -> None:
        self._app, self._api_keys, self._admin_keys = app, api_keys, admin_keys
        self._limiter, self._on_rejected = limiter, on_rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                self._check(scope)
            except (InvalidKeyError, LocalOnlyError, OverloadedError) as error:
                self._on_rejected(error.reason)
                raise
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path = scope["path"]
        if path == ADMIN or path.startswith(f"{ADMIN}/"):
            if self._admin_keys:
                access.of(scope).key = _identify(scope, self._admin_keys)
            elif not is_local(scope):
                raise LocalOnlyError("Without admin_keys, /admin answers this machine alone")
            return
        known = access.of(scope)
        if self._api_keys:
            known.key = _identify(scope, self._api_keys)
        if self._limiter is not None:
            self._limiter.enter(known.key or _address(scope))


def _identify(scope: Scope, keys: Keys) -> str:
    """The fingerprint of the request's key. Raises InvalidKeyError."""
    given = _values(scope, b"authorization")
    if not given:
        raise InvalidKeyError("This server needs a key: send `Authorization: Bearer KEY`")
    scheme, _, key = given[0].partition(b" ")
    fingerprint = keys.find(key.strip())
    if len(given) > 1 or scheme.lower() != b"bearer" or fingerprint is None:
        raise InvalidKeyError("Incorrect API key provided")
    return fingerprint


def is_local(scope: Scope) -> bool:
    """Whether a program on this machine asks, for itself.

    A web page is none, though its browser runs here: browsers add `Origin` to what changes
    something, and a page whose name was rebound to this machine's address has its own name in
    `Host`. Nor is a proxy.
    """
    names = {name for name, _ in scope["headers"]}
    hosts = _values(scope, b"host")
    if not scope["client"] or names & _FORWARDED or b"origin" in names or len(hosts) != 1:
        return False
    return is_loopback(scope["client"][0]) and is_loopback(_host_name(hosts[0].decode("latin-1")))


def is_loopback(host: str) -> bool:
    """Whether a name or an address without port is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


def _host_name(header: str) -> str:
    """Without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _address(scope: Scope) -> str:
    """The client's; of IPv6 the network, for one client has the whole of it."""
    host: str = scope["client"][0] if scope["client"] else ""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # of a Unix socket
        return host
    if isinstance(address, IPv4Address):
        return host
    return str(address.ipv4_mapped or IPv6Network((address, 64), strict=False))


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
