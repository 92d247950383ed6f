"""`POST /v1/chat/completions`: check a chat request, make it safe, and let the engine answer it."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from serving.chat_service import (
    ChatService,
    ask_engine,
    chat_service,
    check_engine,
    check_model,
    check_pictures,
    check_tokens,
    safe_messages,
)
from serving.notes import note_of
from serving.openapi import ERRORS, EVENTS
from serving.protocols.chat import ChatRequest
from serving.protocols.chat_answers import ChatAnswer

router = APIRouter()


@router.post("/v1/chat/completions", responses=ERRORS | {200: {"model": ChatAnswer, "content": EVENTS}})
async def chat_completions(
    body: ChatRequest, request: Request, service: Annotated[ChatService, Depends(chat_service)]
) -> Response:
    """Answer a conversation about pictures. Streams server-sent events when `stream` is true."""
    model = check_model(body.model, service, note_of(request))
    check_tokens(body.max_tokens, "max_tokens", service)
    check_tokens(body.max_completion_tokens, "max_completion_tokens", service)
    check_pictures(body.messages, "messages", service, note_of(request))
    await check_engine(service.engine)
    await service.adapters.hold(model)
    upstream_body = body.sampling() | {"messages": await safe_messages(body.messages, service, note_of(request))}
    return await ask_engine(request, "/v1/chat/completions", upstream_body, service)
