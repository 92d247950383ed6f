"""`POST /v1/responses`: OpenAI's newer way to chat, through the same checks, for engines that know it."""

from typing import Annotated, Any

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
from serving.errors import ApiError
from serving.notes import note_of
from serving.openapi import ERRORS, EVENTS
from serving.protocols.chat_answers import ResponsesAnswer
from serving.protocols.responses import ResponsesRequest

PATH = "/v1/responses"

router = APIRouter()


@router.post(PATH, responses=ERRORS | {200: {"model": ResponsesAnswer, "content": EVENTS}})
async def responses(
    body: ResponsesRequest, request: Request, service: Annotated[ChatService, Depends(chat_service)]
) -> Response:
    """Answer a conversation about pictures as a response object, or as its events when `stream` is true."""
    model = check_model(body.model, service, note_of(request))
    check_tokens(body.max_output_tokens, "max_output_tokens", service)
    messages = body.conversation_so_far()
    check_pictures(messages, "input", service, note_of(request))
    await check_engine(service.engine)
    await service.adapters.hold(model)
    items = [_as_item(message) for message in await safe_messages(messages, service, note_of(request))]
    answer = await ask_engine(request, PATH, body.sampling() | {"input": items, "store": False}, service)
    if answer.status_code == 404:
        raise ApiError(404, "The engine behind this server has no /v1/responses; use /v1/chat/completions.")
    return answer


def _as_item(message: dict[str, Any]) -> dict[str, Any]:
    """A safe message of a chat as /v1/responses writes it."""
    parts = message["content"]
    if all(part["type"] == "text" for part in parts):
        return {"role": message["role"], "content": "".join(part["text"] for part in parts)}
    content = [
        {"type": "input_text", "text": part["text"]}
        if part["type"] == "text"
        else {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"}
        for part in parts
    ]
    return {"role": message["role"], "content": content}
