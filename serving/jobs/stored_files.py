"""Keep uploaded files: checked line by line on their way in, each visible to its owner alone."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from assistant.durable import to_disk
from serving.errors import ApiError
from serving.jobs.data_folder import DataFolder, new_id
from serving.protocols.files import Purpose, StoredFile, StoredFiles

LONGEST_NAME = 200
MIB = 2**20


@dataclass(frozen=True)
class FileLimits:
    """What files may take: lines of one, bytes of a line (a row with its pictures), bytes and files of one owner."""

    rows: int = 50_000
    line_bytes: int = 32 * MIB
    owner_bytes: int = 4 * 2**30
    owner_files: int = 1_000
    free_bytes: int = 256 * MIB  # that stay free on the disk


@dataclass(frozen=True)
class Kept:
    """A file, and how many rows it has."""

    file: StoredFile
    rows: int


class FileStore:
    """The files of a data folder. `owner` is the name of a key, or None where the server asks for none."""

    def __init__(self, data: DataFolder, limits: FileLimits = FileLimits()) -> None:
        self.data, self.limits = data, limits
        for left in data.files.glob("*.partial"):  # a kill in the middle of an upload
            left.unlink()

    def add_lessons(self, owner: str | None, name: str | None, source: BinaryIO) -> StoredFile:
        """Keep an uploaded file of rows to teach. Raises ApiError naming the line that is no row, or the limit."""
        kept, count = self._usage(owner)
        if count >= self.limits.owner_files:
            raise ApiError(413, f"You have {count:,} files here, which is the most; delete some.", param="file")
        identity = new_id("file")
        partial = self.data.files / f"{identity}.partial"
        rows = 0
        try:
            with partial.open("wb") as sink:
                size = 0
                for line in checked_lines(source, self.limits):
                    rows += bool(line.strip())
                    size += len(line)
                    self._check_room(kept + size)
                    sink.write(line)
            if rows == 0:
                raise ApiError(400, "file: it holds no rows; write a JSON object with messages a line.", param="file")
            return self._keep(identity, owner, name, "fine-tune", partial, rows)
        finally:
            partial.unlink(missing_ok=True)

    def add_result(self, owner: str | None, name: str, content: str) -> StoredFile:
        """Keep a file that a job made."""
        identity = new_id("file")
        partial = self.data.files / f"{identity}.partial"
        partial.write_text(content)
        return self._keep(identity, owner, name, "fine-tune-results", partial, 0)

    def get(self, owner: str | None, identity: str, param: str = "file_id") -> Kept:
        """Raises ApiError (404) where this owner has no such file."""
        with self.data.changing() as database:
            found = database.execute(
                "SELECT document, rows FROM files WHERE id = ? AND owner IS ?", (identity, owner)
            ).fetchone()
        if found is None:
            raise ApiError(404, f"No such File object: {identity}", param=param, code="file_not_found")
        return Kept(StoredFile.model_validate_json(found[0]), found[1])

    def path(self, identity: str) -> Path:
        """Where the content lies of a file that is there."""
        return self.data.files / identity

    def page(
        self, owner: str | None, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> StoredFiles:
        """Files behind `after` in their order. Raises ApiError where that is none of the owner's."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        bound = None if after is None else self._number(owner, after)
        with self.data.changing() as database:
            rows = database.execute(
                f"SELECT document FROM files WHERE owner IS ? AND (? IS NULL OR number {sign} ?) "
                f"AND (? IS NULL OR json_extract(document, '$.purpose') = ?) ORDER BY number {order} LIMIT ?",
                (owner, bound, bound, purpose, purpose, limit + 1),
            ).fetchall()
        files = [StoredFile.model_validate_json(document) for (document,) in rows[:limit]]
        ends = {"first_id": files[0].id, "last_id": files[-1].id} if files else {}
        return StoredFiles(data=files, has_more=len(rows) > limit, **ends)

    def delete(self, owner: str | None, identity: str) -> None:
        """Raises ApiError (404) where this owner has no such file."""
        self.get(owner, identity)
        with self.data.changing() as database:
            database.execute("DELETE FROM files WHERE id = ?", (identity,))
        self.path(identity).unlink(missing_ok=True)

    def _keep(
        self, identity: str, owner: str | None, name: str | None, purpose: Purpose, partial: Path, rows: int
    ) -> StoredFile:
        to_disk(partial)
        size = partial.stat().st_size
        stored = StoredFile(
            id=identity, bytes=size, created_at=int(time.time()), filename=plain_name(name), purpose=purpose
        )
        partial.replace(self.path(identity))
        with self.data.changing() as database:
            database.execute(
                "INSERT INTO files (id, owner, rows, document) VALUES (?, ?, ?, ?)",
                (identity, owner, rows, stored.model_dump_json()),
            )
        return stored

    def _usage(self, owner: str | None) -> tuple[int, int]:
        """Bytes and number of the owner's files."""
        with self.data.changing() as database:
            size, count = database.execute(
                "SELECT COALESCE(SUM(json_extract(document, '$.bytes')), 0), COUNT(*) FROM files WHERE owner IS ?",
                (owner,),
            ).fetchone()
        return int(size), int(count)

    def _check_room(self, size: int) -> None:
        if size > self.limits.owner_bytes:
            most = self.limits.owner_bytes / MIB
            raise ApiError(413, f"Your files would hold more than {most:,.0f} MiB; delete some.", param="file")
        if shutil.disk_usage(self.data.files).free < self.limits.free_bytes:
            raise ApiError(507, "There is no room on the server's disk for this file.", code="no_space")

    def _number(self, owner: str | None, identity: str) -> int:
        with self.data.changing() as database:
            found = database.execute(
                "SELECT number FROM files WHERE id = ? AND owner IS ?", (identity, owner)
            ).fetchone()
        if found is None:
            raise ApiError(400, f"after: there is no file {identity}", param="after")
        return int(found[0])


def checked_lines(source: BinaryIO, limits: FileLimits) -> Iterator[bytes]:
    """The lines of `source`, each an object with a list of messages, or blank.

    Raises ApiError naming the line that is not, or that is one too many. What the rows say is looked at when a job is
    made of them: that needs the model.
    """
    for number, line in enumerate(iter(lambda: source.readline(limits.line_bytes + 1), b""), start=1):
        if number > limits.rows:
            raise ApiError(413, f"file: more than {limits.rows:,} lines; split it.", param="file")
        if len(line) > limits.line_bytes:
            most = limits.line_bytes / MIB
            raise ApiError(413, f"file: line {number} is over {most:g} MiB; make its pictures smaller.", param="file")
        fault = fault_of_line(line) if line.strip() else None
        if fault is not None:
            raise ApiError(400, f"file: line {number} {fault}", param="file", code="invalid_file_format")
        yield line


def fault_of_line(line: bytes) -> str | None:
    """What keeps `line` from being a row, in words."""
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError:
        return "is not UTF-8."
    except ValueError as error:
        return f"is not JSON ({str(error)[:80]}); write one object a line."
    except RecursionError:
        return "is nested too deep."
    if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
        return 'has no list of messages; write {"messages": [...]} a line.'
    return None


def plain_name(name: str | None) -> str:
    """The last part of what a client calls its file, in letters that can be shown."""
    last = PurePosixPath((name or "").replace("\\", "/")).name[:LONGEST_NAME]
    return "".join(letter for letter in last if letter.isprintable()).strip() or "upload.jsonl"
