"""`POST /v1/captions` and `POST /v1/answers`: a text of each picture, uploaded as files or as data URLs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from assistant.questions import CAPTION_STYLES, tidied
from serving.bodies import read_body
from serving.captioning import Question, ask_each
from serving.chat_service import ChatService, chat_service, check_engine, check_model, check_tokens
from serving.notes import note_of
from serving.openapi import ERRORS
from serving.protocols.captions import AnswersRequest, CaptionsRequest, PicturesRequest, PictureTexts
from serving.upstream import unless_gone

ANSWER_TOKENS = 256

router = APIRouter()


@router.post("/v1/captions", responses=ERRORS | {200: {"model": PictureTexts}})
async def captions(request: Request, service: Annotated[ChatService, Depends(chat_service)]) -> Response:
    """Caption pictures in a style. A picture that cannot be read is named in the answer, and the rest go on."""
    body, names = await read_body(request, CaptionsRequest, files="pictures")
    words = CAPTION_STYLES[body.style]
    asked = Question(words.question, words.max_tokens, body.temperature)
    return await _texts(request, body, names, asked, lambda text: tidied(text, body.style), service)


@router.post("/v1/answers", responses=ERRORS | {200: {"model": PictureTexts}})
async def answers(request: Request, service: Annotated[ChatService, Depends(chat_service)]) -> Response:
    """Ask one question about each picture on its own."""
    body, names = await read_body(request, AnswersRequest, files="pictures")
    asked = Question(body.question, ANSWER_TOKENS, body.temperature)
    return await _texts(request, body, names, asked, str.strip, service)


async def _texts(
    request: Request,
    body: PicturesRequest,
    names: Sequence[str | None],
    question: Question,
    finish: Callable[[str], str],
    service: ChatService,
) -> Response:
    note = note_of(request)
    model = check_model(body.model, service, note)
    check_tokens(body.max_tokens, "max_tokens", service)
    note.take_pictures(len(body.pictures))
    await check_engine(service.engine)
    await service.adapters.hold(model)
    usual = question.max_tokens
    if service.context_length is not None:
        usual = min(usual, service.context_length // 2)  # the other half is for the picture and the question
    asked = replace(question, max_tokens=body.max_tokens or usual)

    async def answer() -> Response:
        texts = await ask_each(model, asked, body.pictures, names, finish, service, note)
        return Response(texts.model_dump_json(), media_type="application/json")

    return await unless_gone(request, answer)
