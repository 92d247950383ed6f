"""`GET /v1/models`, and `GET` and `DELETE /v1/models/{id}`: the base and the adapters that are served beside it."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from serving.adapter_record import Adapter
from serving.adapters import AdapterShelf
from serving.chat_service import ChatService, chat_service, check_model
from serving.errors import ApiError
from serving.notes import Note, note_of
from serving.openapi import ERRORS
from serving.protocols.models import DeletedModel, Model, ModelList

router = APIRouter()
STARTED = int(time.time())
Service = Annotated[ChatService, Depends(chat_service)]


@router.get("/v1/models", responses=ERRORS)
async def models(request: Request, service: Service) -> ModelList:
    """List the models that may be asked for: the base, and the adapters on it that this key may use."""
    adapters = service.adapters.list(note_of(request).owner())
    return ModelList(data=[_base(service), *(_described(adapter, service) for adapter in adapters)])


@router.get("/v1/models/{name:path}", responses=ERRORS)
async def one_model(name: str, request: Request, service: Service) -> Model:
    """Describe the model with this id; a hub name with its slash is an id too."""
    note = note_of(request)
    check_model(name, service, note)
    adapter = service.adapters.find(name, note.owner())
    return _base(service) if adapter is None else _described(adapter, service)


@router.delete("/v1/models/{name:path}", responses=ERRORS)
async def delete_model(name: str, request: Request, service: Service) -> DeletedModel:
    """Serve an adapter no longer; its own files stay where they are. Answers that run are finished with it."""
    check_model(name, service, note_of(request))
    await unload_own(name, service.adapters, note_of(request))
    return DeletedModel(id=name)


async def unload_own(name: str, shelf: AdapterShelf, note: Note) -> None:
    """Unload an adapter of whoever asks. Raises ApiError for the base and for what the server itself loaded."""
    adapter = shelf.find(name, note.owner())
    if adapter is None and name == shelf.base_name:
        raise ApiError(400, f"`{name}` is the base, and stays; only adapters can be unloaded.", param="name")
    if adapter is not None and adapter.owner != note.owner():
        raise ApiError(403, f"The person who runs the server loaded `{name}` for everybody; it stays.", param="name")
    await shelf.unload(name)


def _base(service: ChatService) -> Model:
    return Model(id=service.model_name, created=STARTED)


def _described(adapter: Adapter, service: ChatService) -> Model:
    return Model(
        id=adapter.name, created=adapter.created, owned_by=adapter.owner or "kangaroo", parent=service.model_name
    )
