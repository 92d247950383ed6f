"""Run jobs one after the other, each as a process of its own, from the check of its data to the loaded model."""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.errors import ApiError
from serving.jobs.commands import (
    JobFolder,
    check_arguments,
    faults_in,
    read_report,
    tune_arguments,
    warnings_in,
)
from serving.jobs.data_folder import DataFolder
from serving.jobs.process import NICEST, JobProcess, why_it_failed
from serving.jobs.progress import StepTeller, metrics_csv
from serving.jobs.records import JobRecord, JobRecords
from serving.jobs.stored_files import FileStore
from serving.model_folder import ModelFacts
from serving.protocols.fine_tuning import JobError, Status

SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_BETWEEN_MEASURES = 2.0
GIB = 2**30
LOG_TAIL = 2_000  # characters of a failed job's log that go into the server's

log = logging.getLogger("kangaroo.jobs")


class Shelf(Protocol):
    """Where finished adapters go, to be asked by name; it keeps a copy that outlives the server."""

    async def load(self, name: str, folder: Path, owner: str | None = None) -> object:
        """Raises ApiError with the reason where the engine cannot serve it."""

    def find(self, name: str, owner: str | None) -> object | None:
        """What is there already by this name."""


@dataclass(frozen=True)
class JobLimits:
    """What a job may take: seconds for each of its processes, bytes of its folder; and bytes of disk that stay free."""

    seconds: float = 24 * 3600.0
    folder_bytes: int = 64 * GIB
    free_bytes: int = GIB // 4
    niceness: int = NICEST


class JobFailedError(RuntimeError):
    """A job that cannot go on; the message is for its owner."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = JobError(code=code, message=message, param=param)


class JobRunner:
    """Works through the jobs of a data folder: one is checked and one is trained at a time, the oldest first.

    What ran when the server stopped goes on when it starts again, from its newest checkpoint. Jobs of another model
    than the one that is served wait until that is.
    """

    def __init__(
        self,
        data: DataFolder,
        files: FileStore,
        records: JobRecords,
        model_name: str,
        facts: ModelFacts,
        shelf: Shelf,
        limits: JobLimits = JobLimits(),
    ) -> None:
        """`model_name` and `facts` are of the model that is served, the only one that is taught here."""
        self.data, self.files, self.records = data, files, records
        self.model_name, self.model = model_name, facts.folder.absolute()
        self.shelf, self.limits = shelf, limits

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Works while it is entered. At the end a running job is stopped, with a checkpoint where it comes to that."""
        tasks = [
            asyncio.create_task(work)
            for work in (self._work_through(self._check, "validating_files"), self._train_all())
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _train_all(self) -> None:
        self._remove_leftovers()
        for record in self.records.alive():
            if record.job.model != self.model_name:
                words = f"This server serves {self.model_name} now; the job waits until {record.job.model} is served"
                self.records.tell(record.job.id, words, "warn")
        await self._work_through(self._train, "running", "queued")

    async def _work_through(self, work: Callable[[JobRecord], Awaitable[None]], *statuses: Status) -> None:
        while True:
            waiting = (self.records.oldest(status, self.model_name) for status in statuses)
            record = next((found for found in waiting if found is not None), None)
            if record is None:
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            try:
                await work(record)
            except JobFailedError as error:
                self._fail(record, error.error)
            except Exception:  # whatever it is, the other jobs go on, and this one's owner is told
                log.exception("The job %s failed.", record.job.id)
                self._fail(record, JobError(code="server_error", message="The server failed; its log says why."))

    def _fail(self, record: JobRecord, error: JobError) -> None:
        def failed(changed: JobRecord) -> None:
            changed.job.status, changed.job.error = "failed", error

        if self.records.change(record.job.id, failed, f"The job failed: {error.message}", "error") is not None:
            log.warning("The job %s failed: %s\n%s", record.job.id, error.message, self._log_of(record)[-LOG_TAIL:])
        self._forget(record)

    def _forget(self, record: JobRecord) -> None:
        """Keep nothing of a job that has ended; the shelf has a copy of the adapter of one that succeeded."""
        shutil.rmtree(self._folder(record).folder, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """What a kill left of jobs that have ended."""
        alive = {record.job.id for record in self.records.alive()}
        for folder in self.data.jobs.iterdir():
            if folder.name not in alive:
                shutil.rmtree(folder, ignore_errors=True)

    async def _check(self, record: JobRecord) -> None:
        job, folder = record.job, self._folder(record)
        folder.folder.mkdir(mode=0o700, exist_ok=True)
        self.records.tell(job.id, f"Validating training file: {job.training_file}")
        arguments = check_arguments(record, self.model)
        process = await self._started(arguments, self.data.files, folder.report, folder.log)
        code = await self._finished(process, record)
        if code is None:
            self._forget(record)
            return
        report = read_report(folder.report)
        for fault in faults_in(report or []):
            raise JobFailedError(f"invalid_{fault.param}", fault.message, fault.param)
        if code != 0 or report is None:
            kind = "invalid_training_file" if code == 1 else "check_failed"
            raise JobFailedError(kind, self._without_paths(why_it_failed(code, self._log_of(record))), "training_file")
        for warning in warnings_in(report):
            self.records.tell(job.id, warning, "warn")

        def validated(changed: JobRecord) -> None:
            changed.job.status, changed.tokens = "queued", int(report[0]["tokens"])

        self.records.change(job.id, validated, "Files validated, moving job to queued state")

    async def _train(self, record: JobRecord) -> None:
        job, folder = record.job, self._folder(record)
        if not (record.is_loading and folder.adapter.is_dir()):
            self._begin(record)
            self._check_room()
            arguments = tune_arguments(record, self.model, self.data.files, folder)
            process = await self._started(arguments, folder.folder, folder.said, folder.log)
            code = await self._finished(process, record, StepTeller(self.records, record, folder.steps))
            if code is None:
                self._forget(record)
                return
            if code != 0:
                raise JobFailedError("training_failed", self._without_paths(why_it_failed(code, self._log_of(record))))
            if self.records.change(job.id, _set_loading) is None:  # cancelled in the last moment
                self._forget(record)
                return
        await self._load_new(record)

    def _begin(self, record: JobRecord) -> None:
        def begun(changed: JobRecord) -> None:
            changed.job.status = "running"

        words = "Fine-tuning job started"
        if record.job.status == "running":
            words = "The server was started again; the job goes on from its newest checkpoint"
        self.records.change(record.job.id, begun, words)
        self._folder(record).folder.mkdir(mode=0o700, exist_ok=True)

    def _check_room(self) -> None:
        """The merged model is written twice on the way, beside checkpoints that are small."""
        model = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
        needed, free = 3 * model + self.limits.free_bytes, shutil.disk_usage(self.data.jobs).free
        if free < needed:
            message = f"there is no room on the server's disk: {needed / GIB:.1f} GiB are needed, {free / GIB:.1f} free"
            raise JobFailedError("no_space", message)

    async def _started(self, arguments: Sequence[str], where: Path, output: Path, log: Path) -> JobProcess:
        while True:
            try:
                return JobProcess(arguments, where, output, log, self.limits.niceness)
            except BlockingIOError:  # of a server that was killed a moment ago
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    async def _finished(
        self, process: JobProcess, record: JobRecord, each_look: Callable[[], None] = lambda: None
    ) -> int | None:
        """The exit code of `process`, which is None where the job was cancelled meanwhile.

        Raises JobFailedError where it passes a limit.
        """
        folder, began = self._folder(record), time.monotonic()
        measured = began
        try:
            while (code := process.code()) is None:
                now = self.records.find(record.job.id)
                if now is None or now.job.has_ended:
                    return None
                if time.monotonic() - began > self.limits.seconds:
                    raise JobFailedError("time_limit", f"it took longer than {self.limits.seconds:,.0f} s")
                if time.monotonic() - measured > SECONDS_BETWEEN_MEASURES:
                    await asyncio.to_thread(self._check_size, folder)
                    measured = time.monotonic()
                each_look()
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            each_look()
            return code
        finally:
            await asyncio.to_thread(process.stop)

    def _check_size(self, folder: JobFolder) -> None:
        if folder.bytes() > self.limits.folder_bytes:
            most = self.limits.folder_bytes / GIB
            raise JobFailedError("disk_limit", f"it took more than {most:,.3g} GiB of the server's disk")
        if shutil.disk_usage(self.data.jobs).free < self.limits.free_bytes:
            raise JobFailedError("no_space", "there is no room left on the server's disk")

    async def _load_new(self, record: JobRecord) -> None:
        name = model_name_of(record)
        try:
            if self.shelf.find(name, record.owner) is None:  # it is there where a kill came right behind it
                await self.shelf.load(name, self._folder(record).adapter, record.owner)
        except ApiError as error:
            raise JobFailedError("model_not_loaded", f"its model cannot be loaded: {error}") from error
        table = metrics_csv(self.records.metrics(record.job.id))
        result = self.files.add_result(record.owner, f"{record.job.id}_metrics.csv", table)

        def succeeded(changed: JobRecord) -> None:
            job = changed.job
            job.status, job.fine_tuned_model, job.result_files = "succeeded", name, [result.id]
            job.trained_tokens = changed.tokens * job.hyperparameters.n_epochs

        self.records.tell(record.job.id, f"New fine-tuned model created: {name}")
        self.records.change(record.job.id, succeeded, "The job has successfully completed")
        self._forget(record)

    def _folder(self, record: JobRecord) -> JobFolder:
        return JobFolder(self.data.jobs / record.job.id)

    def _log_of(self, record: JobRecord) -> str:
        file = self._folder(record).log
        return file.read_text(errors="replace") if file.is_file() else ""

    def _without_paths(self, words: str) -> str:
        """Where things lie on the server is nothing for a client."""
        return words.replace(f"{self.data.folder}/", "").replace(f"{self.model.parent}/", "")


def _set_loading(record: JobRecord) -> None:
    record.is_loading = True


def model_name_of(record: JobRecord) -> str:
    """What the model that comes out of a job is called, in OpenAI's way."""
    return f"ft:{record.job.model}:{record.suffix}:{record.job.id[-8:]}"
