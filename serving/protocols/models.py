"""What the list of models says."""

from typing import Literal

from pydantic import BaseModel


class Model(BaseModel):
    """One model that may be asked for by its `id`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kangaroo"


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
