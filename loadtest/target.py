"""Which model of a host is measured, and whether the host takes a `cache_salt`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadtest.errors import HostError
from loadtest.host import Host

SALTED_OWNERS = frozenset({"dlight-serve", "vllm"})  # other hosts may refuse an unknown field
NO_SUCH_ROUTE = (404, 405, 501)


@dataclass(frozen=True)
class Target:
    """The `model` to name in each request, and what `/v1/models` says of who serves it."""

    model: str
    owned_by: str | None

    @property
    def takes_cache_salt(self) -> bool:
        return self.owned_by in SALTED_OWNERS


def find_target(host: Host, model: str | None) -> Target:
    """The named model, or the host's first; raises HostError if it lists none or fails.

    A host without `/v1/models` is fine as long as the model is named: its owner is then unknown.
    """
    try:
        models = host.models()
    except HostError as error:
        if model is None or error.status not in NO_SUCH_ROUTE:
            raise
        models = []
    if model is None and not models:
        raise HostError("/v1/models lists no model; name one with --model")
    return Target(model or models[0]["id"], _owner(models, model))


def _owner(models: list[dict[str, Any]], model: str | None) -> str | None:
    """Who serves `model`; a name that isn't listed belongs to whoever serves the first."""
    listed = [entry for entry in models if entry["id"] == model] or models
    return listed[0].get("owned_by") if listed else None
