"""Read Parquet shards of pictures with their captions, labels and questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image

from assistant.images import PictureError, open_picture


class DataError(ValueError):
    """Training data that is missing or damaged; the message names the file and row and the way out."""


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


class DecodedPictures:
    """Pixels of rows, decoded once and kept as uint8 (C, H, W): decoding costs more than a small model's step."""

    def __init__(self, rows: Sequence[PictureRow]) -> None:
        self.rows = rows
        self._pixels: dict[int, torch.Tensor] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        """Pixels of row `index`, uint8 (3, H, W). Raises DataError naming the row when it cannot be decoded."""
        if index not in self._pixels:
            self._pixels[index] = pixels_of(picture_of(self.rows[index]))
        return self._pixels[index]


def picture_of(row: PictureRow) -> Image.Image:
    """The opened picture of `row`, RGB. Raises DataError naming the row."""
    try:
        return open_picture(row.encoded, name=row.id)
    except PictureError as error:
        raise DataError(f"row {row.id} of {row.shard}: {error}") from error


def pixels_of(picture: Image.Image) -> torch.Tensor:
    """uint8 (3, H, W) pixels of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
