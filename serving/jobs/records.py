"""Remember jobs and what happened to them; every change is there after a kill, and no two changes mix."""

import sqlite3
import time
from collections.abc import Callable, Collection, Mapping
from typing import Literal

from pydantic import BaseModel

from serving.errors import ApiError
from serving.jobs.data_folder import DataFolder, new_id
from serving.protocols.fine_tuning import ALIVE, ENDED, FineTuningJob, JobEvent, JobEventList, Status

Level = Literal["info", "warn", "error"]


class JobRecord(BaseModel):
    """A job, and what only the server knows of it.

    Args:
        job: what its owner sees.
        owner: the name of a key, or None.
        suffix: of the new model's name.
        tokens: of the training file, as the model reads it; 0 until it was checked.
        steps: of the whole run.
        told: bytes of the run's log that have become events.
        is_loading: it is trained and its model is being loaded, so that it cannot be cancelled any more.
    """

    job: FineTuningJob
    owner: str | None
    suffix: str
    tokens: int = 0
    steps: int
    told: int = 0
    is_loading: bool = False


class JobRecords:
    """The jobs of a data folder and their events."""

    def __init__(self, data: DataFolder) -> None:
        self.data = data

    def add(self, record: JobRecord) -> None:
        """Remember a new job."""
        with self.data.changing() as database:
            database.execute(
                "INSERT INTO jobs (id, owner, status, document) VALUES (?, ?, ?, ?)",
                (record.job.id, record.owner, record.job.status, record.model_dump_json()),
            )

    def get(self, owner: str | None, identity: str) -> JobRecord:
        """Raises ApiError (404) where this owner has no such job."""
        record = self.find(identity)
        if record is None or record.owner != owner:
            raise ApiError(
                404, f"No such fine-tuning job: {identity}", param="fine_tuning_job_id", code="job_not_found"
            )
        return record

    def find(self, identity: str) -> JobRecord | None:
        """The job with this id, whoever owns it."""
        with self.data.changing() as database:
            found = database.execute("SELECT document FROM jobs WHERE id = ?", (identity,)).fetchone()
        return None if found is None else JobRecord.model_validate_json(found[0])

    def oldest(self, status: Status, model: str) -> JobRecord | None:
        """The job of `model` that was made first among those of this status."""
        return next((record for record in self.all_of((status,)) if record.job.model == model), None)

    def all_of(self, statuses: Collection[Status]) -> list[JobRecord]:
        """The jobs of `statuses`, the oldest first."""
        places = ", ".join("?" * len(statuses))
        with self.data.changing() as database:
            rows = database.execute(
                f"SELECT document FROM jobs WHERE status IN ({places}) ORDER BY number", tuple(statuses)
            ).fetchall()
        return [JobRecord.model_validate_json(document) for (document,) in rows]

    def alive(self) -> list[JobRecord]:
        """The jobs that have not ended, the oldest first."""
        return self.all_of(ALIVE)

    def newest_of(self, owner: str | None) -> list[JobRecord]:
        """All jobs of `owner`, the newest first."""
        with self.data.changing() as database:
            rows = database.execute(
                "SELECT document FROM jobs WHERE owner IS ? ORDER BY number DESC", (owner,)
            ).fetchall()
        return [JobRecord.model_validate_json(document) for (document,) in rows]

    def change(
        self, identity: str, change: Callable[[JobRecord], None], message: str | None = None, level: Level = "info"
    ) -> JobRecord | None:
        """Do `change` to a job that has not ended; the job after it, or None where it had ended before.

        What happened then is told in `message`, in the same moment.
        """
        with self.data.changing() as database:
            found = database.execute("SELECT document FROM jobs WHERE id = ?", (identity,)).fetchone()
            if found is None:
                return None
            record = JobRecord.model_validate_json(found[0])
            if record.job.has_ended:
                return None
            change(record)
            if record.job.status in ENDED:
                record.job.finished_at = int(time.time())
                record.job.estimated_finish = None
            database.execute(
                "UPDATE jobs SET status = ?, document = ? WHERE id = ?",
                (record.job.status, record.model_dump_json(), identity),
            )
            if message is not None:
                _insert_event(database, identity, message, level, None)
        return record

    def users_of(self, file: str) -> list[str]:
        """Ids of the jobs that have not ended and read `file`."""
        return [one.job.id for one in self.alive() if file in (one.job.training_file, one.job.validation_file)]

    def tell(
        self, identity: str, message: str, level: Level = "info", numbers: Mapping[str, float] | None = None
    ) -> None:
        """Note that something happened to a job, with the `numbers` of a step where there are some."""
        with self.data.changing() as database:
            _insert_event(database, identity, message, level, numbers)

    def events(self, identity: str, after: str | None, limit: int) -> JobEventList:
        """The newest events of a job, those before `after`. Raises ApiError where it is none of its events."""
        with self.data.changing() as database:
            bound = None
            if after is not None:
                found = database.execute("SELECT number FROM events WHERE id = ? AND job = ?", (after, identity))
                bound = found.fetchone()
                if bound is None:
                    raise ApiError(400, f"after: there is no event {after}", param="after")
            rows = database.execute(
                "SELECT document FROM events WHERE job = ? AND (? IS NULL OR number < ?) ORDER BY number DESC LIMIT ?",
                (identity, *(bound or (None,)) * 2, limit + 1),
            ).fetchall()
        events = [JobEvent.model_validate_json(document) for (document,) in rows[:limit]]
        return JobEventList(data=events, has_more=len(rows) > limit)

    def events_from(self, identity: str, number: int) -> list[tuple[int, JobEvent]]:
        """The events of a job behind the one with this number, the oldest first, each with its number."""
        with self.data.changing() as database:
            rows = database.execute(
                "SELECT number, document FROM events WHERE job = ? AND number > ? ORDER BY number", (identity, number)
            ).fetchall()
        return [(count, JobEvent.model_validate_json(document)) for count, document in rows]

    def metrics(self, identity: str) -> list[dict[str, float]]:
        """The numbers of a job's steps, oldest first."""
        return [event.data for _, event in self.events_from(identity, 0) if event.data]


def _insert_event(
    database: sqlite3.Connection, identity: str, message: str, level: Level, numbers: Mapping[str, float] | None
) -> None:
    event = JobEvent(
        id=new_id("ftevent"),
        created_at=int(time.time()),
        level=level,
        message=message,
        type="message" if numbers is None else "metrics",
        data=None if numbers is None else dict(numbers),
    )
    database.execute(
        "INSERT INTO events (id, job, document) VALUES (?, ?, ?)", (event.id, identity, event.model_dump_json())
    )
