"""The folder that outlives the server: one SQLite database, uploaded files, jobs on their way, adapters they left."""

import fcntl
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from serving.keys import default_key_file

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT, rows INTEGER NOT NULL,
    document TEXT NOT NULL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT, status TEXT NOT NULL,
    document TEXT NOT NULL
);
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL, document TEXT NOT NULL
);
CREATE INDEX events_of_job ON events (job, number);
"""


class DataFolderError(ValueError):
    """The data folder cannot be used; the message says why and what to do."""


class FolderInUseError(DataFolderError):
    """Another server uses the data folder."""


def default_data_folder() -> Path:
    """Where files and jobs are kept where nobody says otherwise: beside the keys."""
    return default_key_file().parent


class DataFolder:
    """Files, jobs and their events, for one server at a time; any thread may use it.

    What `changing` did is there after a kill of this process, and all of it or none.
    """

    def __init__(self, folder: Path) -> None:
        """Raises FolderInUseError where another server has it, and DataFolderError where it cannot be written."""
        self.folder = folder.expanduser().absolute()
        self.files, self.jobs, self.adapters = (self.folder / name for name in ("files", "jobs", "adapters"))
        self._alone = threading.RLock()
        try:
            for place in (self.files, self.jobs, self.adapters):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            self._take_lock()
        except OSError as error:
            raise DataFolderError(f"The data folder {self.folder} cannot be used: {error.strerror}.") from error
        try:
            self._database = _opened(self.folder / "kangaroo.db")
        except DataFolderError:
            os.close(self._handle)
            raise

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._handle)
            raise FolderInUseError(
                f"Another server uses the data folder {self.folder}; stop it, or name another with --data-folder."
            ) from error

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """The database, alone, for one transaction: kept where all went well, else undone."""
        with self._alone, self._database:
            yield self._database

    def close(self) -> None:
        """Let another server have it."""
        with self._alone:
            self._database.close()
            os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opened(file: Path) -> sqlite3.Connection:
    try:
        database = sqlite3.connect(file, check_same_thread=False)
        # A reader and a writer do not wait for each other, and a kill at any moment leaves the last whole state.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        version = int(database.execute("PRAGMA user_version").fetchone()[0])
        if version == 0:
            database.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    except sqlite3.Error as error:
        raise DataFolderError(f"{file} cannot be used ({error}); mend it, or move it away and start anew.") from error
    if version > SCHEMA_VERSION:
        raise DataFolderError(f"{file} was written by a newer Kangaroo; use that one, or name another --data-folder.")
    return database


def new_id(kind: str) -> str:
    """An id that nobody guesses: `file-`, `ftjob-` and so on, with 96 random bits behind."""
    return f"{kind}-{secrets.token_hex(12)}"
