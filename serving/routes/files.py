"""`/v1/files`: upload, list, look at, fetch and delete the files that models are taught with."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.routing import APIRoute
from starlette.responses import FileResponse, Response

from serving.jobs.job_service import JobService, job_service, owner_of
from serving.openapi import ERRORS
from serving.protocols.errors import ErrorAnswer
from serving.protocols.files import FileDeleted, FileUpload, StoredFile, StoredFiles


class OneFileRequest(Request):
    """A request whose form may hold one file and few short fields: all else of a large body would lie in memory."""

    def form(self, *, max_files: int | float = 1, max_fields: int | float = 8, max_part_size: int = 4096) -> Any:
        """As Starlette's, with limits of our own."""
        return super().form(max_files=max_files, max_fields=max_fields, max_part_size=max_part_size)


class OneFileRoute(APIRoute):
    """A route that reads its form so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, on that request."""
        handle = super().get_route_handler()

        async def handle_one_file(request: Request) -> Response:
            return await handle(OneFileRequest(request.scope, request.receive))

        return handle_one_file


router = APIRouter(route_class=OneFileRoute)
Service = Annotated[JobService, Depends(job_service)]
Owner = Annotated[str | None, Depends(owner_of)]
MOST_LISTED = 10_000
LINES = "application/jsonl"
BYTES = {"schema": {"type": "string", "format": "binary"}}
CONTENT: dict[int | str, dict[str, Any]] = {200: {"content": {LINES: BYTES}}}
IN_USE: dict[int | str, dict[str, Any]] = {409: {"model": ErrorAnswer, "description": "A job still reads the file."}}
FULL: dict[int | str, dict[str, Any]] = {507: {"model": ErrorAnswer, "description": "The server's disk is full."}}


@router.post("/v1/files", responses=ERRORS | FULL)
async def upload(
    form: Annotated[FileUpload, Form(media_type="multipart/form-data")], service: Service, owner: Owner
) -> StoredFile:
    """Keep a file of rows to teach with. That each line is one is checked here, what they say when a job is made."""
    source = form.file
    return await anyio.to_thread.run_sync(service.files.add_lessons, owner, source.filename, source.file)


@router.get("/v1/files", responses=ERRORS)
def files(
    service: Service,
    owner: Owner,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
    order: Literal["asc", "desc"] = "desc",
) -> StoredFiles:
    """List your files, a page at a time."""
    return service.files.page(owner, purpose, after, limit, newest_first=order == "desc")


@router.get("/v1/files/{file_id}", responses=ERRORS)
def one_file(file_id: str, service: Service, owner: Owner) -> StoredFile:
    """Describe one of your files."""
    return service.files.get(owner, file_id).file


@router.get("/v1/files/{file_id}/content", responses=ERRORS | CONTENT, response_class=FileResponse)
def content(file_id: str, service: Service, owner: Owner) -> FileResponse:
    """Fetch what is in one of your files."""
    file = service.files.get(owner, file_id).file
    headers = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(service.files.path(file_id), media_type=LINES, filename=file.filename, headers=headers)


@router.delete("/v1/files/{file_id}", responses=ERRORS | IN_USE)
def delete(file_id: str, service: Service, owner: Owner) -> FileDeleted:
    """Delete one of your files, unless a job still reads it."""
    service.delete_file(owner, file_id)
    return FileDeleted(id=file_id)
