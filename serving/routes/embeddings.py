"""`POST /v1/embeddings` and `POST /v1/classifications`: pictures and texts in one space, with no engine needed."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from serving.bodies import read_body
from serving.chat_service import ChatService, chat_service, check_model
from serving.embedding import classifications, embeddings
from serving.embedding_service import EmbeddingService, embedding_service
from serving.notes import note_of
from serving.openapi import ERRORS
from serving.protocols.embeddings import Classifications, ClassificationsRequest, Embeddings, EmbeddingsRequest

router = APIRouter()
Chat = Annotated[ChatService, Depends(chat_service)]
Embedding = Annotated[EmbeddingService, Depends(embedding_service)]


@router.post("/v1/embeddings", responses=ERRORS)
async def embed(body: EmbeddingsRequest, request: Request, chat: Chat, service: Embedding) -> Embeddings:
    """Embed texts and pictures as points of unit length in one space: what belongs together lies close."""
    note = note_of(request)
    check_model(body.model, chat, note)
    note.take_pictures(body.pictures())
    answer = await service.run(lambda embedder: embeddings(embedder, body, chat.picture_limits))
    note.take_usage(answer.usage.model_dump())
    return answer


@router.post("/v1/classifications", responses=ERRORS)
async def classify(request: Request, chat: Chat, service: Embedding) -> Classifications:
    """Say which of your labels fits each picture best; nothing has to be trained for them."""
    body, names = await read_body(request, ClassificationsRequest, files="pictures")
    check_model(body.model, chat, note_of(request))
    note_of(request).take_pictures(len(body.pictures))
    limits = chat.picture_limits
    return await service.run(lambda embedder: classifications(embedder, body, names, chat.model_name, limits))
