"""Read pictures that a file of captions names, as JSON lines or as CSV."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.data.catalogue import Catalogue, stamp_of
from training.data.pictures import DataError

NAMED = 3  # how many missing pictures an error names


class CaptionedPictures:
    """The pictures that `file` names, in its order; lines about one picture are put together.

    JSON lines (.jsonl): `{"image": "a.jpg", "caption": "..."}` or `"captions": [...]`, and `"label"`. CSV: a header
    with `image` and `caption`, `label` or both. Paths are relative to the file's folder. Raises DataError naming the
    line that cannot be read, or the pictures that are missing.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise DataError(f"there is no caption file {file}; name one that ends in .jsonl or .csv")
        captions: dict[str, list[str]] = {}
        labels: dict[str, str | None] = {}
        for line, record in _records(file):
            image, texts, label = _checked(record, f"line {line} of {file}")
            captions.setdefault(image, []).extend(texts)
            labels[image] = label or labels.get(image)
        if not captions:
            raise DataError(f"the caption file {file} names no picture")
        self.file = file
        self.files = [file.parent / image for image in captions]
        self._check_presence()
        self.catalogue = Catalogue([str(f) for f in self.files], list(captions.values()), list(labels.values()))

    def _check_presence(self) -> None:
        missing = [path for path in self.files if not path.is_file()]
        if missing:
            listed = ", ".join(str(path) for path in missing[:NAMED]) + (" ..." if len(missing) > NAMED else "")
            raise DataError(
                f"{self.file} names {len(missing)} of {len(self.files)} pictures that are not there: {listed}. "
                f"Paths count from the folder {self.file.parent}; bring the pictures or take out their lines"
            )

    def content(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.files[index]

    def stamp(self) -> str:
        """Names, sizes and times of the caption file and of all pictures."""
        return stamp_of([self.file, *self.files])


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    """Line number and record of every line that is not blank."""
    if file.suffix.lower() not in (".jsonl", ".csv"):
        raise DataError(f"the caption file {file} ends neither in .jsonl nor in .csv")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() == ".jsonl":
                for line, text in enumerate(lines, 1):
                    if text.strip():
                        yield line, json.loads(text)
                return
            table = csv.DictReader(lines)
            header = table.fieldnames or ()
            if "image" not in header or not {"caption", "label"} & set(header):
                raise DataError(f"the header of {file} has to name image and caption (or label), not {list(header)}")
            for record in table:
                yield table.line_num, record
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"line {line} of {file} is not JSON: {error}") from error
    except csv.Error as error:
        raise DataError(f"{file} is not CSV: {error}") from error


def _checked(record: Any, where: str) -> tuple[str, list[str], str | None]:
    """Image, captions and label of a record; `where` is what errors call it."""
    if not isinstance(record, dict) or not isinstance(record.get("image"), str) or not record["image"]:
        raise DataError(f"{where} names no image")
    texts = record.get("captions") or []
    if not isinstance(texts, list):
        raise DataError(f"{where}: captions is not a list")
    texts = [*([record["caption"]] if record.get("caption") else []), *texts]
    label = record.get("label")
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: a caption is not a text")
    if label is not None and not isinstance(label, str):
        raise DataError(f"{where}: label is not a text")
    return record["image"], texts, label
