"""POST /admin/models/…: load, unload and switch libraries while the others serve on."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve.api import openapi
from serve.api.body import read_json
from serve.api.schemas import LibraryRequest

State = Literal["loading", "loaded", "unloading", "unloaded", "failed"]


class LibraryState(BaseModel):
    """A profile on a backend, as far as this server has to do with it.

    phase: of a load. error: why it failed. traffic: its share of the requests for the model's own
    name, 0 to 1.
    """

    profile: str
    backend: str
    name: str
    state: State
    phase: str | None = None
    error: str | None = None
    is_default: bool = False
    traffic: float = 0.0
    digest: str | None = None


class ReloadReport(BaseModel):
    """What a reload of the settings came to; a bad edit is a 400 and changes nothing."""

    changed: list[str]
    libraries: list[LibraryState]


class Admin(Protocol):
    """What the endpoints ask for; see serve/deployment.py.

    All raise RequestError for what does not exist, ConflictError for what cannot be done now, and
    LoadError if a load was waited for and failed.
    """

    async def load(self, profile: str, backend: str | None, wait: bool) -> LibraryState: ...
    async def unload(self, profile: str, backend: str | None, wait: bool) -> LibraryState: ...
    async def make_default(self, profile: str, backend: str | None, wait: bool) -> LibraryState: ...
    async def reload(self) -> ReloadReport: ...
    def states(self) -> list[LibraryState]: ...
    def profiles(self) -> list[dict[str, Any]]: ...


def routes(admin: Admin) -> APIRouter:
    router = APIRouter(prefix="/admin")
    described: dict[str, Any] = {
        "responses": {
            **openapi.answers(LibraryState, 400, 401, 409),
            202: {"model": LibraryState, "description": "It has begun"},
        },
        "openapi_extra": openapi.body(LibraryRequest),
    }

    @router.post("/models/load", **described)
    async def load(request: Request) -> Response:
        """Load a profile's library beside the others, compiling it if need be."""
        asked = await read_json(request, LibraryRequest)
        return _answer(await admin.load(asked.profile, asked.backend, asked.wait))

    @router.post("/models/unload", **described)
    async def unload(request: Request) -> Response:
        """Unload a library; the sequences that it computes finish."""
        asked = await read_json(request, LibraryRequest)
        return _answer(await admin.unload(asked.profile, asked.backend, asked.wait))

    @router.post("/models/default", **described)
    async def default(request: Request) -> Response:
        """Switch what the model's own name means, loading the library first if need be."""
        asked = await read_json(request, LibraryRequest)
        return _answer(await admin.make_default(asked.profile, asked.backend, asked.wait))

    @router.get("/models", responses=openapi.answers(list[LibraryState], 401))
    async def states() -> list[LibraryState]:
        """Every library that is loaded, or comes, or goes, or failed to come."""
        return admin.states()

    @router.post("/reload", responses=openapi.answers(ReloadReport, 400, 401, 409))
    async def reload() -> ReloadReport:
        """Read the settings again, as SIGHUP does."""
        return await admin.reload()

    return router


def _answer(state: LibraryState) -> Response:
    is_under_way = state.state in ("loading", "unloading") and state.phase is not None
    return JSONResponse(state.model_dump(), 202 if is_under_way else 200)
