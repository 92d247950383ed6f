"""What `/v1/files` takes and gives: files that are uploaded to teach a model with, and what comes of teaching."""

from typing import Annotated, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

Purpose = Literal["fine-tune", "fine-tune-results"]


class FileUpload(BaseModel):
    """The form of `POST /v1/files`."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[
        UploadFile,
        Field(
            description="JSON lines, each with `messages` that end with the answer to learn; pictures are data URLs."
        ),
    ]
    purpose: Annotated[Literal["fine-tune"], Field(description="What files are kept for here.")]


class StoredFile(BaseModel):
    """A file as OpenAI describes one; `bytes` is its size, `created_at` seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: str | None = None
    expires_at: int | None = None


class StoredFiles(BaseModel):
    """One page of the answer to `GET /v1/files`."""

    object: Literal["list"] = "list"
    data: list[StoredFile]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class FileDeleted(BaseModel):
    """The answer to `DELETE /v1/files/{file_id}`."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
