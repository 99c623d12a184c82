"""GET /v1/models: what is loaded, under all of its names."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve.api import openapi
from serve.api.served import ServedModel, ServedModels


class ModelCard(BaseModel):
    """OpenAI's four fields, and ours. `root`: the plainest name of the same model and library."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dlight-serve"
    root: str
    backend: str
    profile: str
    quantization: str
    digest: str
    max_model_len: (
        int  # tokens of prompt and completion together; vLLM's name, which its clients read
    )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def routes(models: ServedModels) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", responses=openapi.answers(ModelList))
    async def list_models() -> ModelList:
        """Every name that `model` may have in a request."""
        return ModelList(data=[_card(name, models.named(name)) for name in models.names])

    @router.get("/v1/models/{name:path}", responses=openapi.answers(ModelCard, 404))
    async def retrieve_model(name: str) -> ModelCard:
        """One model, by any of its names."""
        if not name:
            raise HTTPException(404)
        return _card(name, models.named(name))

    return router


def _card(name: str, model: ServedModel) -> ModelCard:
    return ModelCard(
        id=name,
        created=model.created,
        root=model.name,
        backend=model.backend,
        profile=model.profile,
        quantization=model.quantization,
        digest=model.digest,
        max_model_len=model.max_context,
    )
