"""`GET` and `POST /v1/adapters`, `DELETE /v1/adapters/{name}`: list, load and unload adapters while the server runs."""

from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Body, Depends, Request

from serving.adapter_folders import FolderError, adapter_below
from serving.adapter_record import Adapter
from serving.adapters import AdapterShelf
from serving.chat_service import ChatService, chat_service
from serving.errors import ApiError
from serving.notes import note_of
from serving.openapi import ERRORS
from serving.protocols.adapters import DeletedAdapter, LoadAdapter, ServedAdapter, ServedAdapters
from serving.protocols.errors import ErrorAnswer
from serving.routes.models import unload_own

router = APIRouter()
TAKEN: dict[int | str, dict[str, Any]] = {409: {"model": ErrorAnswer, "description": "The name is taken."}}
EXAMPLE = {"name": "birds", "folder": "birds/model/adapter"}
LoadBody = Annotated[
    LoadAdapter,
    Body(openapi_examples={"a_folder": {"summary": "What lies below the server's folder", "value": EXAMPLE}}),
]
Service = Annotated[ChatService, Depends(chat_service)]


@router.get("/v1/adapters", responses=ERRORS)
async def adapters(request: Request, service: Service) -> ServedAdapters:
    """List the adapters that this key may use, and whether the engine has them now."""
    shelf = service.adapters
    return ServedAdapters(data=[_described(adapter, shelf) for adapter in shelf.list(note_of(request).owner())])


@router.post("/v1/adapters", responses=ERRORS | TAKEN)
async def load_adapter(body: LoadBody, request: Request, service: Service) -> ServedAdapter:
    """Load an adapter from the server's own folder of them, for the key that asks alone where keys are asked for."""
    shelf = service.adapters
    if shelf.places.folder is None:
        message = "This server has no folder of adapters; it is started with `kangaroo serve --adapters FOLDER`."
        raise ApiError(400, message, param="folder", code="no_adapter_folder")
    try:
        folder = await anyio.to_thread.run_sync(adapter_below, shelf.places.folder, body.folder)
    except FolderError as error:
        raise ApiError(400, f"folder: {error}.", param="folder", code="adapter_refused") from error
    return _described(await shelf.load(body.name, folder, note_of(request).owner()), shelf)


@router.delete("/v1/adapters/{name:path}", responses=ERRORS)
async def unload_adapter(name: str, request: Request, service: Service) -> DeletedAdapter:
    """Serve an adapter no longer; its own files stay where they are. Answers that run are finished with it."""
    note = note_of(request)
    if name != service.model_name and service.adapters.find(name, note.owner()) is None:
        raise ApiError(404, f"There is no adapter `{name}`.", param="name", code="model_not_found")
    await unload_own(name, service.adapters, note)
    return DeletedAdapter(id=name)


def _described(adapter: Adapter, shelf: AdapterShelf) -> ServedAdapter:
    return ServedAdapter(
        id=adapter.name,
        created=adapter.created,
        owned_by=adapter.owner or "kangaroo",
        parent=shelf.base_name,
        modules=adapter.modules,
        rank=adapter.rank,
        status="loaded" if shelf.is_held(adapter) else "waiting",
    )
