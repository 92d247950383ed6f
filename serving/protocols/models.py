"""What the list of models says."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field


class Model(BaseModel):
    """One model that may be asked for by its `id`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kangaroo"
    parent: Annotated[str | None, Field(description="The base, where this is an adapter on it.")] = None


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class DeletedModel(BaseModel):
    """The answer to a request that an adapter be served no longer."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
