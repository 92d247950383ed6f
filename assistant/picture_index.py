"""An index of the pictures in a folder, kept beside them in one file and brought up to date by content."""

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from assistant.file_embedding import file_hashes
from assistant.images import PictureError
from assistant.picture_files import pictures_below

INDEX_FILE = ".kangaroo-index.sqlite"
LAYOUT = 1
COMMIT_EVERY = 64  # pictures; what a kill loses at most
SCHEMA = {
    "facts": "name TEXT PRIMARY KEY, value TEXT NOT NULL",
    "files": "path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, content TEXT NOT NULL",
    "contents": "content TEXT PRIMARY KEY, vector BLOB, damage TEXT",
}
Embed = Callable[[Iterable[Path]], Iterator[tuple[Path, Tensor | PictureError]]]


class IndexFileError(ValueError):
    """An index that cannot be kept or used; the message says why and the way out."""


@dataclass
class Refreshed:
    """What was found when an index was brought up to date; `damaged` names pictures that cannot be read, and why."""

    unchanged: int = 0
    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    damaged: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    size: int
    modified: int
    content: str = ""

    def same_stamp(self, other: "_File") -> bool:
        return (self.size, self.modified) == (other.size, other.modified)


class PictureIndex:
    """The embeddings of all pictures below `folder`, in `INDEX_FILE` there or in a file of one's own.

    A picture is known by the sha256 of its bytes, so that a renamed or copied one is not embedded again. Some dozen
    pictures at a time are committed: a process that is killed loses those at most, and never the file. Several
    processes may use it at once.
    """

    def __init__(self, folder: Path, tower: str, file: Path | None = None, anew: bool = False) -> None:
        """`tower` names what embeds, by the hash of its weights; with `anew` all that was there is forgotten.

        Raises IndexFileError when there is no such folder, when the file cannot be written or is no index, and when it
        was made with another tower: embeddings of two towers cannot be compared.
        """
        if not folder.is_dir():
            raise IndexFileError(f"there is no folder {folder}; name a folder of pictures")
        self.folder = folder
        self.file = file or folder / INDEX_FILE
        with _said_of(self.file):
            self._database = _opened(self.file, tower, anew)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def refresh(self, embed: Embed) -> Refreshed:
        """Take in what is new or changed below the folder, and forget what is gone.

        A file whose size and time are as they were is not read. `embed` is asked for the rest, those of known content
        left out. Who stops it keeps what was embedded until then.
        """
        with _said_of(self.file):
            known, found = self._known(), dict(self._found())
            news = Refreshed()
            touched = [path for path, stamp in found.items() if path not in known or not stamp.same_stamp(known[path])]
            news.unchanged = len(found) - len(touched)
            gone = known.keys() - found.keys()
            hashed = self._hashed(touched, found, news)
            self._count(hashed, known, {known[path].content for path in gone}, news)
            self._take_in(hashed, embed)
            if hashed or gone:
                self._forget(gone)
            news.removed = len(gone) - news.moved
            news.damaged |= dict(
                self._database.execute(
                    "SELECT path, damage FROM files JOIN contents USING (content) WHERE damage NOTNULL ORDER BY path"
                )
            )
        return news

    def vectors(self) -> tuple[list[Path], np.ndarray]:
        """The paths of all pictures that can be read, and their embeddings (N, D) float32."""
        with _said_of(self.file):
            rows = self._database.execute(
                "SELECT path, vector FROM files JOIN contents USING (content) WHERE vector NOTNULL ORDER BY path"
            ).fetchall()
        if not rows:
            return [], np.zeros((0, 0), np.float32)
        return [self.folder / path for path, _ in rows], np.stack([np.frombuffer(v, np.float32) for _, v in rows])

    def _known(self) -> dict[str, _File]:
        rows = self._database.execute("SELECT path, size, modified, content FROM files JOIN contents USING (content)")
        return {path: _File(size, modified, content) for path, size, modified, content in rows}

    def _found(self) -> Iterator[tuple[str, _File]]:
        for file in pictures_below(self.folder):
            try:
                stat = file.stat()
            except OSError:
                continue  # gone between listing and looking
            yield str(file.relative_to(self.folder)), _File(stat.st_size, stat.st_mtime_ns)

    def _hashed(self, paths: Sequence[str], found: dict[str, _File], news: Refreshed) -> dict[str, _File]:
        """The touched files with their content; those that cannot be read are named, and tried again next time."""
        hashed = {}
        for path, (_, content) in zip(paths, file_hashes(self.folder / path for path in paths), strict=True):
            if isinstance(content, str):
                hashed[path] = _File(found[path].size, found[path].modified, content)
            else:
                news.damaged[path] = str(content)
        return hashed

    def _count(self, hashed: dict[str, _File], known: dict[str, _File], left: set[str], news: Refreshed) -> None:
        """`left` are the contents of files that are gone: a new file with one of them was moved."""
        for path, file in hashed.items():
            if path in known:
                news.unchanged += known[path].content == file.content
                news.changed += known[path].content != file.content
            else:
                news.moved += file.content in left
                news.added += file.content not in left

    def _take_in(self, hashed: dict[str, _File], embed: Embed) -> None:
        """Write down the touched files, and the embedding of each content that has none yet."""
        have = {content for (content,) in self._database.execute("SELECT content FROM contents")}
        paths_of: dict[str, list[str]] = defaultdict(list)
        for path, file in hashed.items():
            paths_of[file.content].append(path)
        self._write([], {path: file for path, file in hashed.items() if file.content in have})
        content_of = {self.folder / paths[0]: content for content, paths in paths_of.items() if content not in have}
        made: list[tuple[str, bytes | None, str | None]] = []

        def write() -> None:
            # A content and its files in one go: what no file has is cleared away, by another process too.
            self._write(made, {path: hashed[path] for content, *_ in made for path in paths_of[content]})
            made.clear()

        try:
            for opened, result in embed(content_of):
                if isinstance(result, PictureError):
                    made.append((content_of[opened], None, str(result)))
                else:
                    made.append((content_of[opened], result.numpy().astype(np.float32).tobytes(), None))
                if len(made) == COMMIT_EVERY:
                    write()
        finally:
            write()

    def _write(self, made: Sequence[tuple[str, bytes | None, str | None]], files: dict[str, _File]) -> None:
        rows = [(path, file.size, file.modified, file.content) for path, file in files.items()]
        if made or rows:
            with _transaction(self._database):
                self._database.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?)", made)
                self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)

    def _forget(self, gone: Iterable[str]) -> None:
        with _transaction(self._database):
            self._database.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in gone])
            self._database.execute("DELETE FROM contents WHERE content NOT IN (SELECT content FROM files)")


@contextmanager
def _said_of(file: Path) -> Iterator[None]:
    """What goes wrong in the database as an IndexFileError with the way out."""
    try:
        yield
    except sqlite3.Error as error:
        raise IndexFileError(
            f"the index {file} cannot be used: {error}. Close the other program that uses it, delete it if it is "
            "damaged, or name another place with --index"
        ) from error


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, also when the process is killed in between."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _opened(file: Path, tower: str, anew: bool) -> sqlite3.Connection:
    """The database in `file`, empty when it is new, of an older layout, or to be made `anew`."""
    database = sqlite3.connect(file, timeout=10, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        with _transaction(database):
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and not SCHEMA.keys() <= tables:
                raise IndexFileError(f"{file} is a database of something else; name another place with --index")
            facts = dict(database.execute("SELECT name, value FROM facts")) if tables else {}
            if facts.get("layout") == str(LAYOUT) and facts["tower"] != tower and not anew:
                raise IndexFileError(
                    f"the index {file} was made with another tower, or with this one before it changed: name that one "
                    "with --tower, keep a second index with --index FILE, or make this one again with --anew"
                )
            if anew or facts.get("layout") != str(LAYOUT):
                _begin(database, tower)
    except BaseException:
        database.close()
        raise
    return database


def _begin(database: sqlite3.Connection, tower: str) -> None:
    """Empty tables for the embeddings of `tower`."""
    for table, columns in SCHEMA.items():
        database.execute(f"DROP TABLE IF EXISTS {table}")
        database.execute(f"CREATE TABLE {table} ({columns})")
    database.executemany("INSERT INTO facts VALUES (?, ?)", [("layout", str(LAYOUT)), ("tower", tower)])
