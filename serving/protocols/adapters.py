"""What `/v1/adapters` takes and says."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from serving.protocols.common import Part, Text


class LoadAdapter(Part):
    """The body of `POST /v1/adapters`."""

    name: Annotated[
        Text, Field(min_length=1, max_length=128, description="What it is asked for by: letters, digits and . _ : / -")
    ]
    folder: Annotated[
        Text,
        Field(min_length=1, max_length=1_000, description="Where it lies, below the server's own folder of adapters."),
    ]


class ServedAdapter(BaseModel):
    """An adapter that is served beside the base."""

    id: str
    object: Literal["adapter"] = "adapter"
    created: int
    owned_by: str
    parent: Annotated[str, Field(description="The base that it stands on.")]
    modules: Annotated[int, Field(description="How many layers of the base it stands on.")]
    rank: Annotated[int, Field(description="Its highest rank.")]
    status: Annotated[
        Literal["loaded", "waiting"],
        Field(description="Whether the engine has it now; one that waits is loaded before it is first asked."),
    ]


class ServedAdapters(BaseModel):
    """The answer to `GET /v1/adapters`."""

    object: Literal["list"] = "list"
    data: list[ServedAdapter]


class DeletedAdapter(BaseModel):
    """The answer to `DELETE /v1/adapters/{name}`."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True
