"""An index of the pictures in a folder, kept beside them in one file and brought up to date by content."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from assistant.file_embedding import file_hashes
from assistant.images import PictureError
from assistant.picture_files import pictures_below

INDEX_FILE = ".kangaroo-index.sqlite"
LAYOUT = 1
COMMIT_EVERY = 256  # pictures; what a kill loses at most
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, content TEXT NOT NULL);
CREATE TABLE contents (content TEXT PRIMARY KEY, vector BLOB, damage TEXT);
"""
Embed = Callable[[Iterable[Path]], Iterator[tuple[Path, Tensor | PictureError]]]


class IndexFileError(ValueError):
    """An index that cannot be kept or used; the message says why and the way out."""


@dataclass(frozen=True)
class Hit:
    """A picture that was found, and the cosine of its embedding and the query's."""

    path: Path
    likeness: float


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

    A picture is known by the sha256 of its bytes, so that a renamed or copied one is not embedded again. Every few
    hundred pictures are committed: a process that is killed loses those at most, and never the file.
    """

    def __init__(self, folder: Path, tower: str, file: Path | None = None) -> None:
        """`tower` names what embeds, by the hash of its weights: an index of another tower is begun anew.

        Raises IndexFileError when there is no such folder, or the file cannot be written or is no index.
        """
        if not folder.is_dir():
            raise IndexFileError(f"there is no folder {folder}; name a folder of pictures")
        self.folder = folder
        self.file = file or folder / INDEX_FILE
        try:
            self._database = _opened(self.file, tower)
        except sqlite3.Error as error:
            raise IndexFileError(
                f"the index {self.file} cannot be used: {error}. Close the other program that uses it, delete it if it "
                "is damaged, or name another place with --index"
            ) from error

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def refresh(self, embed: Embed) -> Refreshed:
        """Take in what is new or changed below the folder, and forget what is gone.

        A file whose size and time are as they were is not read. `embed` is asked for the rest, those of known content
        left out.
        """
        known, found = self._known(), dict(self._found())
        news = Refreshed()
        touched = [path for path, stamp in found.items() if path not in known or not stamp.same_stamp(known[path])]
        news.unchanged = len(found) - len(touched)
        gone = known.keys() - found.keys()
        hashed = self._hashed(touched, found, news)
        self._count(hashed, known, {known[path].content for path in gone}, news)
        self._embed_unknown(hashed, embed)
        self._remember(hashed, gone, news)
        news.damaged |= dict(
            self._database.execute(
                "SELECT path, damage FROM files JOIN contents USING (content) WHERE damage IS NOT NULL ORDER BY path"
            )
        )
        return news

    def vectors(self) -> tuple[list[Path], np.ndarray]:
        """The paths of all pictures that can be read, and their embeddings (N, D) float32."""
        rows = self._database.execute(
            "SELECT path, vector FROM files JOIN contents USING (content) WHERE vector IS NOT NULL ORDER BY path"
        ).fetchall()
        if not rows:
            return [], np.zeros((0, 0), np.float32)
        return [self.folder / path for path, _ in rows], np.stack([np.frombuffer(v, np.float32) for _, v in rows])

    def _known(self) -> dict[str, _File]:
        rows = self._database.execute("SELECT path, size, modified, content FROM files")
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

    def _embed_unknown(self, hashed: dict[str, _File], embed: Embed) -> None:
        have = {content for (content,) in self._database.execute("SELECT content FROM contents")}
        wanted = {file.content: self.folder / path for path, file in hashed.items() if file.content not in have}
        content_of = {path: content for content, path in wanted.items()}
        for number, (path, result) in enumerate(embed(wanted.values()), start=1):
            vector = None if isinstance(result, PictureError) else result.numpy().astype(np.float32).tobytes()
            damage = str(result) if isinstance(result, PictureError) else None
            self._database.execute("INSERT INTO contents VALUES (?, ?, ?)", (content_of[path], vector, damage))
            if number % COMMIT_EVERY == 0:
                self._database.commit()
        self._database.commit()

    def _remember(self, hashed: dict[str, _File], gone: Iterable[str], news: Refreshed) -> None:
        rows = [(path, file.size, file.modified, file.content) for path, file in hashed.items()]
        self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        gone = list(gone)
        self._database.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in gone])
        news.removed = len(gone) - news.moved
        self._database.execute("DELETE FROM contents WHERE content NOT IN (SELECT content FROM files)")
        self._database.commit()


class Searcher:
    """Finds the nearest of some embeddings, exactly (FAISS, inner product)."""

    def __init__(self, paths: Sequence[Path], vectors: np.ndarray) -> None:
        """`vectors` (N, D) float32 of unit length, one for each path."""
        import faiss

        self.paths = list(paths)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors, np.float32))

    def nearest(self, query: Tensor, count: int) -> list[Hit]:
        """The `count` pictures (or all, where there are fewer) whose embeddings are nearest to `query` (D,)."""
        count = min(count, len(self.paths))
        likeness, places = self._index.search(query[None].float().cpu().numpy(), count)
        return [Hit(self.paths[place], float(value)) for place, value in zip(places[0], likeness[0], strict=True)]


def _opened(file: Path, tower: str) -> sqlite3.Connection:
    """The database in `file`, empty when it is new or was made with another tower or layout."""
    database = sqlite3.connect(file, timeout=10)
    database.execute("PRAGMA journal_mode = WAL")
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and not {"facts", "files", "contents"} <= tables:
        raise IndexFileError(f"{file} is a database of something else; name another place with --index")
    facts = dict(database.execute("SELECT name, value FROM facts")) if tables else {}
    if facts != {"layout": str(LAYOUT), "tower": tower}:
        for table in tables:
            database.execute(f'DROP TABLE "{table}"')
        database.executescript(SCHEMA)
        database.executemany("INSERT INTO facts VALUES (?, ?)", [("layout", str(LAYOUT)), ("tower", tower)])
        database.commit()
    return database
