"""Hold the names and words of many pictures compactly, and say which pictures have the words that a run uses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow
from pyarrow import compute

Use = Literal["pictures", "captions", "labels", "questions", "statements"]


def texts_of(captions: Sequence[str], label: str | None, use: str) -> tuple[str, ...]:
    """What is taught of a picture: its captions, its label in a sentence, or no words at all."""
    if use == "captions":
        return tuple(captions)
    if use == "labels" and label:
        return (f"A photo of a {label.replace('_', ' ')}.",)
    return ()


class Catalogue:
    """Names, captions and labels by index. Arrow tables are not copied into data workers as lists of objects are."""

    def __init__(self, names: Sequence[str], captions: Sequence[Sequence[str]], labels: Sequence[str | None]) -> None:
        """Blank captions and labels count as none."""
        kept = [[text for text in (c.strip() for c in texts) if text] for texts in captions]
        self.table = pyarrow.table(
            {
                "name": pyarrow.array(names, pyarrow.string()),
                "captions": pyarrow.array(kept, pyarrow.list_(pyarrow.string())),
                "label": pyarrow.array(
                    [label.strip() or None if label else None for label in labels], pyarrow.string()
                ),
            }
        )

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        """What errors call picture `index`."""
        return self.table["name"][index].as_py()

    def label(self, index: int) -> str | None:
        """The label of picture `index`, or None."""
        return self.table["label"][index].as_py()

    def texts(self, index: int, use: str) -> tuple[str, ...]:
        """`texts_of` picture `index`."""
        return texts_of(self.table["captions"][index].as_py(), self.label(index), use)

    def having(self, use: str) -> np.ndarray:
        """Indices (int64, rising) of the pictures that have a text for `use`; of all, where no words are used."""
        if use == "captions":
            wanted = compute.greater(compute.list_value_length(self.table["captions"]), 0)
        elif use == "labels":
            wanted = compute.is_valid(self.table["label"])
        else:
            return np.arange(len(self))
        return np.flatnonzero(wanted.to_numpy())


class EncodedPictures(Protocol):
    """What the reader of a format offers: a catalogue, and each picture as it is stored, not yet decoded."""

    @property
    def catalogue(self) -> Catalogue:
        """Names and words of all pictures."""

    def content(self, index: int) -> bytes | Path:
        """The file of picture `index`, or its bytes."""

    def stamp(self) -> str:
        """A text that is another one as soon as any picture may be another one: sizes and times of the files."""


def stamp_of(files: Sequence[Path]) -> str:
    """Names, sizes and times of `files`; a file that is not there any more stands with its name alone."""
    return "\n".join(_stamp(file) for file in files)


def _stamp(file: Path) -> str:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return str(file)
    return f"{file} {stat.st_size} {stat.st_mtime_ns}"
