"""`GET /v1/models` and `GET /v1/models/{id}`: the one model that is here."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends

from serving.chat_service import ChatService, chat_service, check_model
from serving.openapi import ERRORS
from serving.protocols.models import Model, ModelList

router = APIRouter()
STARTED = int(time.time())


@router.get("/v1/models", responses=ERRORS)
async def models(service: Annotated[ChatService, Depends(chat_service)]) -> ModelList:
    """List the models that may be asked for: one."""
    return ModelList(data=[Model(id=service.model_name, created=STARTED)])


@router.get("/v1/models/{name:path}", responses=ERRORS)
async def one_model(name: str, service: Annotated[ChatService, Depends(chat_service)]) -> Model:
    """Describe the model with this id; a hub name with its slash is an id too."""
    check_model(name, service)
    return Model(id=service.model_name, created=STARTED)
