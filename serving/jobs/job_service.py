"""What the routes of files and fine-tuning jobs work with: make, find, cancel and follow jobs, each for its owner."""

import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping

from fastapi import Request

from serving.errors import ApiError
from serving.jobs.data_folder import DataFolder, new_id
from serving.jobs.records import JobRecord, JobRecords
from serving.jobs.runner import JobLimits, JobRunner, Shelf
from serving.jobs.stored_files import FileLimits, FileStore, Kept
from serving.model_folder import ModelFacts
from serving.notes import note_of
from serving.protocols.fine_tuning import (
    CheckpointMetrics,
    FineTuningJob,
    Hyperparameters,
    JobCheckpoint,
    JobCheckpointList,
    JobList,
    JobRequest,
    Method,
    Supervised,
)

BATCH = 8
LESSONS = 320  # what few rows are repeated to where nobody says how often
EPOCHS = (3, 25)  # but never less and more than so often
MOST_WAITING = 16  # jobs of one owner that have not ended
HIGHEST_SEED = 2**31 - 1


class JobService:
    """Files and jobs of one server. Every method that takes an `owner` sees what is that owner's alone."""

    def __init__(
        self,
        data: DataFolder,
        model_name: str,
        facts: ModelFacts,
        shelf: Shelf,
        file_limits: FileLimits,
        job_limits: JobLimits,
    ) -> None:
        self.data, self.model_name = data, model_name
        self._takes_adapters = facts.takes_adapters
        self.files = FileStore(data, file_limits)
        self.records = JobRecords(data)
        self.runner = JobRunner(data, self.files, self.records, model_name, facts, shelf, job_limits)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Jobs are worked on while it is entered; the data folder is free for another server afterwards."""
        try:
            async with self.runner.running():
                yield
        finally:
            self.data.close()

    def create(self, owner: str | None, request: JobRequest) -> FineTuningJob:
        """Queue a job. Raises ApiError where the model, a file or the number of jobs is at fault."""
        if request.model != self.model_name:
            message = f"The model `{request.model}` cannot be taught here; this server teaches `{self.model_name}`."
            raise ApiError(404, message, param="model", code="model_not_found")
        if not self._takes_adapters:
            message = f"The model `{self.model_name}` takes no adapters, which is how models are taught here."
            raise ApiError(400, message, param="model", code="model_not_taught")
        waiting = [record for record in self.records.newest_of(owner) if not record.job.has_ended]
        if len(waiting) >= MOST_WAITING:
            raise ApiError(429, f"You have {len(waiting)} jobs that wait or run; let some end.", code="too_many_jobs")
        training = self._lessons(owner, request.training_file, "training_file")
        if request.validation_file is not None:
            self._lessons(owner, request.validation_file, "validation_file")
        record = self._record(owner, request, training.rows)
        self.records.add(record)
        self.records.tell(record.job.id, f"Created fine-tuning job: {record.job.id}")
        return record.job

    def _lessons(self, owner: str | None, identity: str, param: str) -> Kept:
        kept = self.files.get(owner, identity, param)
        if kept.file.purpose != "fine-tune":
            message = f"{param}: the file {identity} has the purpose {kept.file.purpose}, and fine-tune is wanted"
            raise ApiError(400, message, param=param, code="invalid_file_purpose")
        return kept

    def _record(self, owner: str | None, request: JobRequest, rows: int) -> JobRecord:
        how = chosen(request, rows)
        seed = secrets.randbelow(HIGHEST_SEED) if request.seed is None else request.seed
        job = FineTuningJob(
            id=new_id("ftjob"),
            created_at=int(time.time()),
            status="validating_files",
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            hyperparameters=how,
            method=Method(supervised=Supervised(hyperparameters=how)),
            seed=seed,
            metadata=request.metadata,
        )
        steps = math.ceil(how.n_epochs * rows / how.batch_size)
        return JobRecord(job=job, owner=owner, suffix=request.suffix or "", steps=steps)

    def page(self, owner: str | None, after: str | None, limit: int, metadata: Mapping[str, str]) -> JobList:
        """The jobs behind `after`, the newest first, that have all of `metadata`. Raises ApiError: no such `after`."""
        jobs = [record.job for record in self.records.newest_of(owner)]
        if after is not None:
            places = [place for place, job in enumerate(jobs) if job.id == after]
            if not places:
                raise ApiError(400, f"after: there is no job {after}", param="after")
            jobs = jobs[places[0] + 1 :]
        jobs = [job for job in jobs if metadata.items() <= (job.metadata or {}).items()]
        return JobList(data=jobs[:limit], has_more=len(jobs) > limit)

    def cancel(self, owner: str | None, identity: str) -> FineTuningJob:
        """End a job; its process is stopped within seconds. Raises ApiError where it has ended already."""
        self.records.get(owner, identity)

        def cancelled(record: JobRecord) -> None:
            if record.is_loading:
                raise ApiError(400, "The job is trained, and its model is being loaded.", code="job_ended")
            record.job.status = "cancelled"

        record = self.records.change(identity, cancelled, "The job was cancelled")
        if record is None:
            status = self.records.get(owner, identity).job.status
            raise ApiError(400, f"The job has ended already: it is {status}.", code="job_ended")
        return record.job

    def checkpoints(self, owner: str | None, identity: str) -> JobCheckpointList:
        """The finished model; there is none before the job has succeeded. Raises ApiError: no such job."""
        record = self.records.get(owner, identity)
        job = record.job
        if job.fine_tuned_model is None or job.finished_at is None:
            return JobCheckpointList(data=[])
        last: dict[str, float] = {}
        for numbers in self.records.metrics(identity):
            last |= numbers
        metrics = CheckpointMetrics(
            step=record.steps, train_loss=last.get("train_loss"), full_valid_loss=last.get("full_valid_loss")
        )
        checkpoint = JobCheckpoint(
            id=f"ftckpt-{identity.partition('-')[2]}",
            created_at=job.finished_at,
            fine_tuned_model_checkpoint=job.fine_tuned_model,
            fine_tuning_job_id=identity,
            step_number=record.steps,
            metrics=metrics,
        )
        return JobCheckpointList(data=[checkpoint], first_id=checkpoint.id, last_id=checkpoint.id)

    def delete_file(self, owner: str | None, identity: str) -> None:
        """Raises ApiError where there is no such file, or a job still reads it."""
        self.files.get(owner, identity)
        users = self.records.users_of(identity)
        if users:
            message = f"The file {identity} is in use by {', '.join(users)}; cancel that, or wait for its end."
            raise ApiError(409, message, param="file_id", code="file_in_use")
        self.files.delete(owner, identity)


def chosen(request: JobRequest, rows: int) -> Hyperparameters:
    """How a job is taught, where it says `auto` by the number of rows: few of them are repeated more often."""
    wanted = request.wanted()
    least, most = EPOCHS
    epochs = min(most, max(least, math.ceil(LESSONS / rows)))
    return Hyperparameters(
        batch_size=min(BATCH, rows) if wanted.batch_size == "auto" else wanted.batch_size,
        learning_rate_multiplier=(
            1.0 if wanted.learning_rate_multiplier == "auto" else wanted.learning_rate_multiplier
        ),
        n_epochs=epochs if wanted.n_epochs == "auto" else wanted.n_epochs,
    )


async def job_service(request: Request) -> JobService:
    """The service of the app that `request` came to. Raises ApiError where this server keeps no files."""
    service = request.app.state.job_service
    if service is None:
        message = "This server keeps no files and teaches nothing: it has no data folder of its own (--data-folder)."
        raise ApiError(503, message, code="no_data_folder")
    assert isinstance(service, JobService)
    return service


async def owner_of(request: Request) -> str | None:
    """Whose files and jobs a request is about: the name of its key."""
    return note_of(request).owner()
