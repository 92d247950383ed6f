"""Read Parquet shards of pictures with their captions, labels and questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as parquet
import torch
from PIL import Image

from assistant.images import PictureError, open_picture
from assistant.pixels import pixels_of
from training.data.catalogue import Catalogue, stamp_of
from training.data.pixel_cache import DEFAULT_MEMORY, PixelMemory


class DataError(ValueError):
    """Training data that is missing or damaged; the message names the file and row and the way out."""


@dataclass(frozen=True)
class Region:
    """A part of a picture and the words for what stands there."""

    box: tuple[float, float, float, float]  # left, top, right, bottom, as shares of width and height
    words: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A decoded picture and what is said of it, whatever format it came from."""

    name: str  # names file and row, for errors
    pixels: torch.Tensor  # uint8 (3, H, W)
    texts: tuple[str, ...] = ()
    label: str | None = None
    also_true: tuple[str, ...] = ()  # texts that are true of it and not taught here: no picture is told they are false
    whole: bool = False  # its texts are true of the whole picture only: no crop, no mirror
    regions: tuple[Region, ...] = ()  # parts of it that have words of their own; only where it is `whole`


class PictureSet(Protocol):
    """Pictures by index, whatever format they come from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Picture:
        """Picture `index`, the same one every time."""


@dataclass(frozen=True)
class QuestionAnswer:
    """One question about a picture, its answer, and the choices it offers (none when free)."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureRow:
    """One picture of a shard, still encoded, with everything that people said about it."""

    id: str
    shard: str
    encoded: bytes
    label: str | None
    captions: tuple[str, ...]
    questions: tuple[QuestionAnswer, ...]


def shard_files(folder: Path, name: str) -> list[Path]:
    """The files `NAME.parquet` and `NAME-00.parquet`, `NAME-01.parquet` ... of `folder`, in order.

    Raises DataError when there is none.
    """
    files = sorted([*folder.glob(f"{name}-[0-9][0-9].parquet"), *folder.glob(f"{name}.parquet")])
    if not files:
        raise DataError(
            f"no shard {name}-00.parquet (or {name}.parquet) in {folder}; name the folder of shards with --data "
            "or KANGAROO_DATA, or run the recipe 'scenes', which needs no data"
        )
    return files


def read_rows(folder: Path, name: str) -> list[PictureRow]:
    """All rows of the shards called `name`. Pictures stay encoded (a photograph is about 5 kB so)."""
    return [_row(name, record) for file in shard_files(folder, name) for record in parquet.read_table(file).to_pylist()]


def _row(shard: str, record: dict[str, Any]) -> PictureRow:
    questions = (
        QuestionAnswer(q["question"], q["answer"], tuple(q["choices"] or ())) for q in record["qa"] or () if q["answer"]
    )
    return PictureRow(
        id=record["id"],
        shard=shard,
        encoded=record["image"]["bytes"],
        label=record["label"],
        captions=tuple(c for c in record["captions"] or () if c.strip()),
        questions=tuple(questions),
    )


class ShardPictures:
    """The rows of a shard as encoded pictures."""

    def __init__(self, folder: Path, shard: str) -> None:
        self._stamp = stamp_of(shard_files(folder, shard))
        self.rows = read_rows(folder, shard)
        names = [f"row {row.id} of {shard}" for row in self.rows]
        self.catalogue = Catalogue(names, [row.captions for row in self.rows], [row.label for row in self.rows])

    def content(self, index: int) -> bytes:
        """The bytes of row `index`."""
        return self.rows[index].encoded

    def stamp(self) -> str:
        """Names, sizes and times of the shard's files."""
        return self._stamp


class DecodedPictures:
    """Pixels of rows in full size, decoded once while there is room: decoding costs more than a small model's step."""

    def __init__(self, rows: Sequence[PictureRow], memory: int = DEFAULT_MEMORY) -> None:
        """`memory` is how many bytes of pixels are kept."""
        self.rows = rows
        self._memory = PixelMemory(len(rows), memory)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Pixels of row `index`, uint8 (3, H, W). Raises DataError naming the row when it cannot be decoded."""
        kept = self._memory.get(index)
        if kept is None:
            kept = pixels_of(picture_of(self.rows[index]))
            self._memory.put(index, kept)
        return kept


def picture_of(row: PictureRow) -> Image.Image:
    """The opened picture of `row`, RGB. Raises DataError naming the row."""
    try:
        return open_picture(row.encoded, name=row.id)
    except PictureError as error:
        raise DataError(f"row {row.id} of {row.shard}: {error}") from error
