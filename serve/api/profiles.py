"""GET /v1/profiles: which schedules there are, what each does, and which are loaded."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from serve.api import openapi
from serve.api.admin import Admin, LibraryState
from serve.errors import ProfileNotFoundError


class ParameterCard(BaseModel):
    """legal: the values it may have. meaning: what it changes."""

    value: int | float | str | bool
    legal: list[int | float | str | bool]
    meaning: str


class RuleCard(BaseModel):
    id: str
    meaning: str
    parameters: dict[str, ParameterCard]


class KernelCard(BaseModel):
    """A kernel of the library, and the rule that took it.

    declined: why the rules before did not. called_by: the functions that call it.
    """

    kernel: str
    rule: str | None
    as_written: bool
    called_by: list[str]
    declined: dict[str, str] = {}


class LoadedProfile(LibraryState):
    """coverage: null until it is loaded."""

    coverage: list[KernelCard] | None = None


class ProfileCard(BaseModel):
    """rules: in order, by backend or family of backends (cpu, gpu).

    error: why its file cannot be read.
    """

    name: str
    description: str
    error: str | None = None
    rules: dict[str, list[RuleCard]]
    libraries: list[LoadedProfile]


class ProfileList(BaseModel):
    data: list[ProfileCard]


def routes(admin: Admin) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/profiles", responses=openapi.answers(ProfileList, 401))
    async def list_profiles() -> ProfileList:
        """Every profile; the coverage of one is at /v1/profiles/{name}."""
        cards = [_card(profile) for profile in admin.profiles()]
        for library in (library for card in cards for library in card.libraries):
            library.coverage = None
        return ProfileList(data=cards)

    @router.get("/v1/profiles/{name}", responses=openapi.answers(ProfileCard, 401, 404))
    async def retrieve_profile(name: str) -> ProfileCard:
        """One profile: its rules, how far its loads are, and which rule took which kernel."""
        found = {profile["name"]: profile for profile in admin.profiles()}
        if name not in found:
            raise ProfileNotFoundError(name, list(found))
        return _card(found[name])

    return router


def _card(profile: dict[str, Any]) -> ProfileCard:
    return ProfileCard.model_validate(profile)
