"""`POST /v1/chat/completions`: check a chat request, make it safe, and let the engine answer it."""

from dataclasses import dataclass
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from assistant.images import PictureError, PictureLimits, decode_data_url, encode_data_url, open_picture
from assistant.plain_text import PlainText, SpecialTextError
from serving.engine import Engine, Phase
from serving.errors import ApiError
from serving.protocol import ChatRequest, Message, PicturePart, TextPart
from serving.upstream import Upstream

SECONDS_TO_TRY_AGAIN = 5


@dataclass(frozen=True)
class ChatService:
    """What the chat route works with. `context_length` counts tokens; None where the model does not say."""

    engine: Engine
    upstream: Upstream
    model_name: str
    plain_text: PlainText
    most_pictures: int
    picture_limits: PictureLimits
    context_length: int | None
    # Each open picture may take some 200 MB for a moment, so only few are opened at once.
    opening: anyio.CapacityLimiter


def chat_service(request: Request) -> ChatService:
    service = request.app.state.chat_service
    assert isinstance(service, ChatService)
    return service


router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatRequest, request: Request, service: Annotated[ChatService, Depends(chat_service)]
) -> Response:
    """Answer a conversation about pictures. Streams server-sent events when `stream` is true."""
    check_request(body, service)
    await check_engine(service.engine)
    messages = await anyio.to_thread.run_sync(safe_messages, body.messages, service, limiter=service.opening)
    upstream_body = body.sampling() | {"messages": messages}
    return await service.upstream.post(request, "/v1/chat/completions", upstream_body)


def check_request(body: ChatRequest, service: ChatService) -> None:
    """Check what only this server can know: the model's name, its context, the number of pictures."""
    if body.model != service.model_name:
        message = f"The model `{body.model}` does not exist; this server has `{service.model_name}`."
        raise ApiError(404, message, param="model", code="model_not_found")
    for param in ("max_tokens", "max_completion_tokens"):
        asked = getattr(body, param)
        if asked is not None and service.context_length is not None and asked > service.context_length:
            message = f"{param}: the model holds {service.context_length} tokens in all."
            raise ApiError(400, message, param=param)
    pictures = sum(isinstance(part, PicturePart) for message in body.messages for part in message.parts())
    if pictures > service.most_pictures:
        message = f"The messages hold {pictures} pictures; the limit is {service.most_pictures}."
        raise ApiError(400, message, param="messages")


async def check_engine(engine: Engine) -> None:
    state = await anyio.to_thread.run_sync(engine.state)
    if state.phase is Phase.LOADING:
        message = f"The engine is not ready yet: {state.reason}."
        raise ApiError(503, message, code="engine_loading", retry_after=SECONDS_TO_TRY_AGAIN)
    if state.phase is not Phase.READY:
        raise ApiError(503, f"The engine has stopped: {state.reason}.", code="engine_stopped")


def safe_messages(messages: list[Message], service: ChatService) -> list[dict[str, Any]]:
    """The messages as the engine gets them: texts that are only text, pictures that were opened and saved anew."""
    return [
        {"role": message.role, "content": _safe_content(message, f"messages.{number}.content", service)}
        for number, message in enumerate(messages)
    ]


def _safe_content(message: Message, param: str, service: ChatService) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for part in _joined_texts(message):
        if isinstance(part, PicturePart):
            content.append(_safe_picture(part, param, service.picture_limits))
        else:
            content.append({"type": "text", "text": _safe_text(part.text, param, service.plain_text)})
    return content


def _joined_texts(message: Message) -> list[TextPart | PicturePart]:
    """Neighbouring texts as one, as the chat template joins them: `<ima` and `ge>` must not slip through apart."""
    parts: list[TextPart | PicturePart] = []
    for part in message.parts():
        if parts and isinstance(part, TextPart) and isinstance(parts[-1], TextPart):
            parts[-1] = TextPart(type="text", text=parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts


def _safe_text(text: str, param: str, plain_text: PlainText) -> str:
    try:
        return plain_text(text)
    except SpecialTextError as error:
        raise ApiError(400, f"{param}: {error}.", param=param) from error


def _safe_picture(part: PicturePart, param: str, limits: PictureLimits) -> dict[str, Any]:
    try:
        picture = open_picture(decode_data_url(part.image_url.url, limits), limits)
    except PictureError as error:
        raise ApiError(error.status, f"{param}: {error}", param=param, code="invalid_image") from error
    return {"type": "image_url", "image_url": {"url": encode_data_url(picture)}}
