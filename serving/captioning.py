"""Ask the engine one question about each of many pictures, several at once, and tell how each went."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from serving.chat_service import ChatService, check_opened, fetched_pictures, picture_part, safe_picture, safe_text
from serving.errors import ApiError, error_object
from serving.notes import Note
from serving.protocols.captions import PictureText, PictureTexts, Usage
from serving.protocols.errors import ErrorObject
from serving.upstream import CHAT

PICTURES_AT_ONCE = 8  # of one request, opened and at the engine


@dataclass(frozen=True)
class Question:
    """What each picture is asked, and how."""

    text: str
    max_tokens: int
    temperature: float


async def ask_each(
    model: str,
    question: Question,
    pictures: Sequence[str],
    names: Sequence[str | None],
    finish: Callable[[str], str],
    service: ChatService,
    note: Note,
) -> PictureTexts:
    """What `model` says of each of `pictures` (data URLs), in their order; one that fails does not stop the rest.

    `finish` makes the text that is told of the model's.
    Raises ApiError where none could be looked at: the error of the first.
    """
    started = time.monotonic()
    safe = Question(safe_text(question.text, "question", service.plain_text), question.max_tokens, question.temperature)
    texts = [PictureText(index=index, name=name) for index, name in enumerate(names)]
    errors: list[tuple[int, ApiError]] = []
    slots = anyio.CapacityLimiter(PICTURES_AT_ONCE)

    async def ask(index: int) -> None:
        async with slots:
            began = time.monotonic()
            try:
                said = await _said_of(model, pictures[index], f"pictures.{index}", safe, service, note)
                texts[index] = texts[index].model_copy(update=said | {"text": finish(said["text"])})
            except ApiError as error:
                errors.append((index, error))
                told = error_object(error.status, str(error), error.param, error.code)["error"]
                texts[index].error = ErrorObject.model_validate(told)
            texts[index].seconds = round(time.monotonic() - began, 4)

    async with anyio.create_task_group() as group:
        for index in range(len(pictures)):
            group.start_soon(ask, index)
    if len(errors) == len(pictures):
        raise min(errors, key=lambda failed: failed[0])[1]
    usages = [text.usage for text in texts]
    totals = {name: sum(getattr(usage, name) for usage in usages) for name in Usage.model_fields}
    seconds = round(time.monotonic() - started, 4)
    return PictureTexts(model=model, data=texts, failed=len(errors), usage=Usage(**totals), seconds=seconds)


async def _said_of(
    model: str, picture: str, param: str, question: Question, service: ChatService, note: Note
) -> dict[str, Any]:
    """Text, finish reason and usage, as the fields of a `PictureText`."""
    source = (await fetched_pictures([picture], param, service.pictures)).get(picture, picture)
    safe = await safe_picture(source, param, service, note)
    content = [picture_part(safe), {"type": "text", "text": question.text}]
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": question.max_tokens, "temperature": question.temperature}
    try:
        answer = await service.upstream.ask(CHAT, body, note)
    except ApiError:
        await check_opened([(safe, param)], service)
        raise
    choice = answer["choices"][0]
    usage = Usage(**{name: answer["usage"][name] for name in Usage.model_fields})
    return {"text": choice["message"]["content"], "finish_reason": choice["finish_reason"], "usage": usage}
