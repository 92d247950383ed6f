"""`GET /health`, `/ready` and `/metrics`: is it alive, can it answer, what has it done."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import PlainTextResponse, Response

from serving.chat_service import SECONDS_TO_TRY_AGAIN, ChatService, chat_service, check_engine
from serving.doors import Doors
from serving.engine import Phase, state_of
from serving.errors import ApiError
from serving.openapi import ERRORS
from serving.upstream import EngineGone

router = APIRouter()
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


async def doors_of(request: Request) -> Doors:
    doors = request.app.state.doors
    assert isinstance(doors, Doors)
    return doors


@router.get("/health", responses=ERRORS)
async def health(service: Annotated[ChatService, Depends(chat_service)]) -> dict[str, Any]:
    """The gateway is alive when this answers; `engine` says whether it can chat, and why not."""
    state = await state_of(service.engine)
    return {"status": "alive", "engine": {"state": state.phase, "reason": state.reason}}


@router.get("/ready", responses=ERRORS)
async def ready(
    service: Annotated[ChatService, Depends(chat_service)], doors: Annotated[Doors, Depends(doors_of)]
) -> dict[str, str]:
    """Whether requests can be answered now; until then 503, with the stage of loading or the reason."""
    if doors.drain.has_begun:
        raise ApiError(503, "The server is stopping.", code="stopping", retry_after=SECONDS_TO_TRY_AGAIN)
    await check_engine(service.engine)
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse, responses=ERRORS)
async def metrics(
    service: Annotated[ChatService, Depends(chat_service)], doors: Annotated[Doors, Depends(doors_of)]
) -> Response:
    """The gateway's numbers, and vLLM's own under vLLM's names, as Prometheus reads them."""
    state = await state_of(service.engine)
    doors.metrics.engine_ready.set(state.phase is Phase.READY)
    doors.metrics.engine_restarts.set(service.engine.restarts)
    text = doors.metrics.text()
    if state.phase is Phase.READY:
        try:
            text += await service.upstream.get("/metrics")
        except EngineGone:
            doors.metrics.engine_ready.set(0)
            text = doors.metrics.text()
    return Response(text, media_type=PROMETHEUS)
