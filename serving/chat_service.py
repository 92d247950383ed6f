"""Check what only this server can know of a conversation, and make its texts and pictures safe for the engine."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import Request
from starlette.responses import Response

from assistant.images import PictureError, PictureLimits
from assistant.plain_text import PlainText, SpecialTextError
from serving.adapters import AdapterShelf
from serving.engine import Engine, Phase, state_of
from serving.engine_pictures import EnginePicture
from serving.errors import ApiError
from serving.notes import Note, note_of
from serving.pictures import SafePictures
from serving.protocols.common import Message, PicturePart, TextPart
from serving.upstream import Upstream

SECONDS_TO_TRY_AGAIN = 5
MOST_NAMES = 10  # of adapters, in an error
TEXT_AT_ONCE = 2_000  # characters that are made safe in half a millisecond, about what a thread takes to begin


@dataclass(frozen=True)
class ChatService:
    """What the routes work with that ask the engine. `context_length` counts tokens; None where it is not known."""

    engine: Engine
    upstream: Upstream
    model_name: str
    adapters: AdapterShelf
    plain_text: PlainText
    most_pictures: int
    picture_limits: PictureLimits
    pictures: SafePictures
    context_length: int | None
    # Threads that open pictures; how much they unpack at once is bounded by `SafePictures`.
    opening: anyio.CapacityLimiter


# What a route depends on is asynchronous, or FastAPI would fetch it in a thread, half a millisecond for each request.
async def chat_service(request: Request) -> ChatService:
    """The service of the app that `request` came to."""
    service = request.app.state.chat_service
    assert isinstance(service, ChatService)
    return service


def check_model(name: str | None, service: ChatService, note: Note) -> str:
    """The model that is asked for: the base, which None asks for too, or an adapter on it.

    Raises ApiError for any other name, and for those that this key must not see.
    """
    if name is None or name == service.model_name or service.adapters.find(name, note.owner()):
        return name or service.model_name
    others = [adapter.name for adapter in service.adapters.list(note.owner())]
    there = ", ".join(f"`{known}`" for known in (service.model_name, *others[-MOST_NAMES:]))
    raise ApiError(
        404, f"The model `{name}` does not exist; this server has {there}.", param="model", code="model_not_found"
    )


def check_tokens(asked: int | None, param: str, service: ChatService) -> None:
    """Raises ApiError where more tokens are asked for than the model's context holds."""
    if asked is not None and service.context_length is not None and asked > service.context_length:
        raise ApiError(400, f"{param}: the model holds {service.context_length} tokens in all.", param=param)


def check_pictures(messages: Sequence[Message], param: str, service: ChatService, note: Note) -> None:
    """Count the pictures in the messages. Raises ApiError where they are more than one request or key may hold."""
    pictures = sum(isinstance(part, PicturePart) for message in messages for part in message.parts())
    if pictures > service.most_pictures:
        message = f"The messages hold {pictures} pictures; the limit is {service.most_pictures}."
        raise ApiError(400, message, param=param)
    note.take_pictures(pictures)


async def check_engine(engine: Engine) -> None:
    """Raises ApiError (503) with the reason while the engine cannot answer."""
    state = await state_of(engine)
    if state.phase is Phase.LOADING:
        message = f"The engine is not ready yet: {state.reason}."
        raise ApiError(503, message, code="engine_loading", retry_after=SECONDS_TO_TRY_AGAIN)
    if state.phase is not Phase.READY:
        raise ApiError(503, f"The engine has stopped: {state.reason}.", code="engine_stopped")


async def safe_messages(messages: Sequence[Message], service: ChatService, note: Note) -> list[dict[str, Any]]:
    """The messages as the engine gets them: texts that are only text, pictures of `SafePictures`.

    The pictures last until the request of `note` ends.
    """
    is_short = sum(len(message.text()) for message in messages) <= TEXT_AT_ONCE

    async def plain(text: str, param: str) -> str:
        if is_short:
            return safe_text(text, param, service.plain_text)
        return await anyio.to_thread.run_sync(safe_text, text, param, service.plain_text, limiter=service.opening)

    async def safe_content(message: Message, param: str) -> list[dict[str, Any]]:
        addresses = [part.image_url.url for part in message.parts() if isinstance(part, PicturePart)]
        fetched = await fetched_pictures(addresses, param, service.pictures)
        content: list[dict[str, Any]] = []
        for part in _joined_texts(message):
            if isinstance(part, PicturePart):
                source = fetched.get(part.image_url.url, part.image_url.url)
                content.append(picture_part(await safe_picture(source, param, service, note)))
            else:
                content.append({"type": "text", "text": await plain(part.text, param)})
        return content

    return [
        {"role": message.role, "content": await safe_content(message, f"messages.{at}.content")}
        for at, message in enumerate(messages)
    ]


def _joined_texts(message: Message) -> list[TextPart | PicturePart]:
    """Neighbouring texts as one, as the chat template joins them: `<ima` and `ge>` must not slip through apart."""
    parts: list[TextPart | PicturePart] = []
    for part in message.parts():
        if parts and isinstance(part, TextPart) and isinstance(parts[-1], TextPart):
            parts[-1] = TextPart(type="text", text=parts[-1].text + part.text)
        else:
            parts.append(part)
    return parts


def safe_text(text: str, param: str, plain_text: PlainText) -> str:
    """`text` with no special token in it. Raises ApiError where one cannot be taken apart."""
    try:
        return plain_text(text)
    except SpecialTextError as error:
        raise ApiError(400, f"{param}: {error}.", param=param) from error


async def fetched_pictures(addresses: Sequence[str], param: str, pictures: SafePictures) -> dict[str, bytes]:
    """The bytes of those pictures that are not in the request but on a host that is allowed, by their address.

    Raises ApiError for a picture that may not or cannot be fetched.
    """
    try:
        return await pictures.fetched(addresses)
    except PictureError as error:
        raise _refused(error, param) from error


async def safe_picture(source: str | bytes, param: str, service: ChatService, note: Note) -> EnginePicture:
    """The picture in `source`, a data URL or a file's bytes, for the engine, until the request of `note` ends.

    Raises ApiError for a picture that cannot be used, with the status that says why.
    """

    def opened() -> EnginePicture:
        picture = service.pictures.safe_picture(source)
        # In the thread, for nobody gets what it returns when the client goes away meanwhile.
        note.held.append((picture, param))
        return picture

    try:
        if (picture := service.pictures.at_hand(source)) is None:
            return await anyio.to_thread.run_sync(opened, limiter=service.opening)
    except PictureError as error:
        raise _refused(error, param) from error
    note.held.append((picture, param))
    return picture


async def ask_engine(request: Request, path: str, body: dict[str, Any], service: ChatService) -> Response:
    """The engine's answer to `body`, relayed. Raises ApiError for a picture that the engine cannot open."""
    answer = await service.upstream.post(request, path, body)
    if answer.status_code >= 400:
        await check_opened(note_of(request).held, service)
    return answer


async def check_opened(held: Iterable[tuple[EnginePicture, str]], service: ChatService) -> None:
    """Look for the fault in pictures that the engine was the first to open. Raises ApiError for one with a fault."""
    for picture, param in held:
        try:
            await anyio.to_thread.run_sync(service.pictures.check, picture, limiter=service.opening)
        except PictureError as error:
            raise _refused(error, param) from error


def _refused(error: PictureError, param: str) -> ApiError:
    return ApiError(error.status, f"{param}: {error}", param=param, code="invalid_image")


def picture_part(picture: EnginePicture) -> dict[str, Any]:
    """A picture in a message as OpenAI writes it, and the name under which vLLM is to know it again."""
    return {"type": "image_url", "image_url": {"url": picture.url}, "uuid": picture.name}
