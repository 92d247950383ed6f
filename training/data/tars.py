"""Read webdataset tars: what a sample is, and any sample at random through an index of where it lies.

A sample is a run of members whose names are alike up to the first dot: a picture (.jpg, .jpeg, .png, .webp, .gif or
.bmp) with what is said of it (.txt one caption; .json `caption`, `captions` or `text`, and `label`; .cls a label).
Source of the layout: the webdataset library, whose grouping this follows.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from assistant.picture_files import PICTURE_SUFFIXES
from training.data.catalogue import Catalogue, stamp_of
from training.data.pictures import DataError

NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's rule: the key ends at the first dot
META = re.compile(r"__[^/]*__($|/)")  # webdataset's names for what is no sample
TEXT_SUFFIXES = (".txt", ".json", ".cls")
INDEX_LAYOUT = 1

log = logging.getLogger(__name__)


@dataclass
class TarSample:
    """One sample of a tar: where its picture lies (bytes from the file's start), and what is said of it."""

    key: str
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    offset: int = 0
    size: int = -1  # -1 as long as no picture was met
    picture: bytes | None = None  # where the picture itself was read


def expand_tars(pattern: str) -> list[Path]:
    """The tars that `pattern` means, in order: a path, a glob (`*`, `?`), or braces (`{000..003}`, `{a,b}`).

    Raises DataError when there is none, or one that the braces name is missing.
    """
    named = _expand_braces(pattern)
    found = [path for text in named for path in (_matching(Path(text)) if set(text) & set("*?[") else [Path(text)])]
    missing = [str(path) for path in found if not path.exists()]
    if missing:
        raise DataError(f"{len(missing)} of {len(found)} tars of {pattern} are not there: {', '.join(missing[:3])}")
    if not found:
        raise DataError(f"there is no tar {pattern}")
    return found


def _matching(pattern: Path) -> list[Path]:
    root = Path(pattern.anchor)
    return sorted(root.glob(str(pattern.relative_to(root))))


def _expand_braces(pattern: str) -> list[str]:
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        choices = found[1].split(",")
    return [text for c in choices for text in _expand_braces(pattern[: found.start()] + c + pattern[found.end() :])]


def samples_of(tar: tarfile.TarFile, name: str, read_pictures: bool) -> Iterator[TarSample]:
    """The samples of an open tar in order, those without a picture among them (size -1).

    With `read_pictures` the pictures are read too, which a tar that cannot be sought needs. Raises DataError naming
    tar and sample.
    """
    sample: TarSample | None = None
    try:
        for member in tar:
            matched = NAME.match(member.name)
            if not member.isreg() or META.match(member.name) or not matched:
                continue
            key, suffix = matched[1], f".{matched[2].lower()}"
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = TarSample(key)
            if suffix in PICTURE_SUFFIXES:
                _take_picture(sample, tar, member, name, read_pictures)
            elif suffix in TEXT_SUFFIXES:
                _take_words(sample, suffix, _read(tar, member), f"{member.name} of {name}")
            tar.members = []  # type: ignore[attr-defined]  # or the tar keeps every header
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"the tar {name} is damaged or cut off: {error}") from error
    if sample is not None:
        yield sample


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: IO[bytes] | None = tar.extractfile(member)
    content = b"" if file is None else file.read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    return content


def _take_picture(sample: TarSample, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str, read: bool) -> None:
    if sample.size >= 0:
        raise DataError(f"sample {sample.key} of {name} has two pictures; give each its own name before the first dot")
    sample.offset, sample.size = member.offset_data, member.size
    if read:
        sample.picture = _read(tar, member)


def _take_words(sample: TarSample, suffix: str, content: bytes, where: str) -> None:
    try:
        text = content.decode("utf-8")
        if suffix == ".txt":
            sample.captions.append(text)
        elif suffix == ".cls":
            sample.label = text.strip()
        else:
            _take_record(sample, json.loads(text), where)
    except ValueError as error:
        raise DataError(f"{where} cannot be read: {error}") from error


def _take_record(sample: TarSample, record: Any, where: str) -> None:
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object")
    for key in ("caption", "text", "captions"):
        said = record.get(key) or []
        texts = [said] if isinstance(said, str) else said
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: {key} is neither a text nor a list of texts")
        sample.captions += texts
    if record.get("label") is not None:
        sample.label = str(record["label"])


class TarPictures:
    """Every sample with a picture of local, uncompressed tars, in order, read at random.

    One pass over a tar's headers finds where its samples lie; it is kept in the user's cache folder, by the tar's path,
    size and time.
    """

    def __init__(self, tars: Sequence[Path]) -> None:
        self.tars = list(tars)
        tables = [_index_of(tar) for tar in self.tars]
        self._tar_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self._table = pyarrow.concat_tables(tables).combine_chunks()
        if not len(self._table):
            raise DataError(f"no sample of {self.tars[0]} and {len(self.tars) - 1} other tars has a picture")
        keys = self._table["key"].to_pylist()
        names = [f"{key} of {self.tars[number]}" for key, number in zip(keys, self._tar_of, strict=True)]
        self.catalogue = Catalogue(names, self._table["captions"].to_pylist(), self._table["label"].to_pylist())
        self._table = self._table.select(["offset", "size"])

    def content(self, index: int) -> bytes:
        """The bytes of picture `index`."""
        offset, size = self._table["offset"][index].as_py(), self._table["size"][index].as_py()
        try:
            with self.tars[self._tar_of[index]].open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise DataError(f"{self.catalogue.name(index)}: {error}") from error

    def stamp(self) -> str:
        """Names, sizes and times of the tars."""
        return stamp_of(self.tars)


def _index_of(tar: Path) -> pyarrow.Table:
    """Key, offset, size, captions and label of every sample of `tar` that has a picture."""
    cached = _index_folder() / f"{hashlib.sha256(f'{INDEX_LAYOUT} {stamp_of([tar.resolve()])}'.encode()).hexdigest()}"
    if cached.is_file():
        return parquet.read_table(cached)
    table = _scan(tar)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        aside = cached.with_suffix(f".{os.getpid()}")
        parquet.write_table(table, aside)
        aside.rename(cached)
    except OSError as error:
        log.warning("the index of %s is not kept: %s", tar, error)
    return table


def _index_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kangaroo" / "tars"


def _scan(tar: Path) -> pyarrow.Table:
    try:
        with tarfile.open(tar, "r:") as opened:
            samples = list(samples_of(opened, str(tar), read_pictures=False))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} is no uncompressed tar that can be read: {error}") from error
    with_picture = [sample for sample in samples if sample.size >= 0]
    _say_what_is_left_out(tar, samples)
    if with_picture and with_picture[-1].offset + with_picture[-1].size > tar.stat().st_size:
        raise DataError(f"the tar {tar} is damaged or cut off: {with_picture[-1].key} goes on beyond its end")
    columns = {
        "key": pyarrow.array([s.key for s in with_picture], pyarrow.string()),
        "offset": pyarrow.array([s.offset for s in with_picture], pyarrow.int64()),
        "size": pyarrow.array([s.size for s in with_picture], pyarrow.int64()),
        "captions": pyarrow.array([s.captions for s in with_picture], pyarrow.list_(pyarrow.string())),
        "label": pyarrow.array([s.label for s in with_picture], pyarrow.string()),
    }
    return pyarrow.table(columns)


def _say_what_is_left_out(tar: Path, samples: Sequence[TarSample]) -> None:
    bare = [sample.key for sample in samples if sample.size < 0]
    if bare:
        log.warning("%d samples of %s have no picture and are left out: %s", len(bare), tar, ", ".join(bare[:3]))
