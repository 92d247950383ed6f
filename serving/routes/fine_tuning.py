"""`/v1/fine_tuning/jobs`: teach the model by a file of lessons, and ask the new model by its name."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import StreamingResponse

from serving.admission import Drain
from serving.jobs.job_service import JobService, job_service, owner_of
from serving.openapi import ERRORS, EVENTS
from serving.protocols.fine_tuning import FineTuningJob, JobCheckpointList, JobEventList, JobList, JobRequest

router = APIRouter()
Service = Annotated[JobService, Depends(job_service)]
Owner = Annotated[str | None, Depends(owner_of)]
Limit = Annotated[int, Query(ge=1, le=100)]
SECONDS_BETWEEN_LOOKS = 0.5
METADATA = "metadata["  # as clients write one pair of a filter: metadata[name]=value


@router.post("/v1/fine_tuning/jobs", responses=ERRORS)
def create(body: JobRequest, service: Service, owner: Owner) -> FineTuningJob:
    """Teach the model of this server by a file. The job waits until those before it are over."""
    return service.create(owner, body)


@router.get("/v1/fine_tuning/jobs", responses=ERRORS)
def jobs(request: Request, service: Service, owner: Owner, after: str | None = None, limit: Limit = 20) -> JobList:
    """List your jobs, the newest first, a page at a time; `metadata[name]=value` lists those that have it."""
    wanted = {
        name.removeprefix(METADATA).removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith(METADATA)
    }
    return service.page(owner, after, limit, wanted)


@router.get("/v1/fine_tuning/jobs/{job_id}", responses=ERRORS)
def job(job_id: str, service: Service, owner: Owner) -> FineTuningJob:
    """Say how one of your jobs does; one that failed says why."""
    return service.records.get(owner, job_id).job


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel", responses=ERRORS)
def cancel(job_id: str, service: Service, owner: Owner) -> FineTuningJob:
    """End one of your jobs that waits or runs. Its process is stopped within seconds, and nothing of it is kept."""
    return service.cancel(owner, job_id)


@router.get(
    "/v1/fine_tuning/jobs/{job_id}/events",
    responses=ERRORS | {200: {"model": JobEventList, "content": EVENTS}},
    response_model=None,
)
def events(
    job_id: str,
    request: Request,
    service: Service,
    owner: Owner,
    after: str | None = None,
    limit: Limit = 20,
    stream: bool = False,
) -> JobEventList | StreamingResponse:
    """List what happened to one of your jobs, the newest first; with `stream`, from the first on and as it happens."""
    service.records.get(owner, job_id)
    if not stream:
        return service.records.events(job_id, after, limit)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    happened = event_stream(job_id, service, request.app.state.doors.drain)
    return StreamingResponse(happened, headers=headers, media_type="text/event-stream")


async def event_stream(job_id: str, service: JobService, drain: Drain) -> AsyncIterator[str]:
    """Each event as it happens, until the job has ended or the server stops."""
    told = 0
    while True:
        record = service.records.find(job_id)
        for number, event in service.records.events_from(job_id, told):
            told = number
            yield f"data: {event.model_dump_json()}\n\n"
        if record is None or record.job.has_ended or drain.has_begun:
            break
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
    yield "data: [DONE]\n\n"


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", responses=ERRORS)
def checkpoints(
    job_id: str,
    service: Service,
    owner: Owner,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> JobCheckpointList:
    """List the models that came out of one of your jobs: the finished one, once there is."""
    return service.checkpoints(owner, job_id)
