"""Read pictures from a table of the datasets library: a name on the Hugging Face hub, or a local folder or file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.catalogue import Catalogue, stamp_of
from training.data.pictures import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class TablePictures:
    """One split of a dataset, its pictures still encoded.

    A text is a string or a list of strings; a label is a string or one of the table's class names. Raises DataError
    when the dataset cannot be loaded (the network may be away), or has no such split or column.
    """

    def __init__(
        self, name: str | Path, split: str, image_column: str, text_column: str | None, label_column: str | None
    ) -> None:
        """`name` is a hub name, or the path of a local folder or Parquet file."""
        self.name = str(name)
        table = load_split(name, split)
        for column in (image_column, text_column, label_column):
            if column is not None and column not in table.column_names:
                raise DataError(f"the dataset {name} has no column {column}, but {', '.join(table.column_names)}")
        self.pictures = _undecoded(table, image_column, self.name)
        self.image_column = image_column
        names = [f"row {row} of {name} ({split})" for row in range(len(table))]
        captions = [[]] * len(table) if text_column is None else [_texts(t, self.name) for t in table[text_column]]
        labels = [None] * len(table) if label_column is None else _labels(table, label_column)
        self.catalogue = Catalogue(names, captions, labels)

    def content(self, index: int) -> bytes | Path:
        """The bytes of row `index`, or the file that it names."""
        cell = self.pictures[index][self.image_column]
        if isinstance(cell, bytes):
            return cell
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise DataError(f"{self.catalogue.name(index)} has no picture")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])

    def stamp(self) -> str:
        """Names, sizes and times of the files that the table lies in."""
        return f"{self.name} " + stamp_of([Path(file["filename"]) for file in self.pictures.cache_files])


def load_split(name: str | Path, split: str) -> "Dataset":
    """One split of a dataset on the hub (a text), or of a local folder or Parquet file (a path). Raises DataError."""
    # Late: importing the library takes a second, and most runs do not read such tables.
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        if isinstance(name, str):
            return load_dataset(name, split=split)
        if name.is_file():
            return load_dataset("parquet", data_files=str(name), split=split)
        saved = (name / "dataset_dict.json").is_file() or (name / "state.json").is_file()
        loaded = load_from_disk(str(name)) if saved else load_dataset(str(name), split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"the dataset {name}, split {split}, cannot be loaded: {error}. Fetch it once where there is a network, "
            "or name a local folder by its path"
        ) from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"the dataset {name} has no split {split}, but {', '.join(loaded)}")
        return loaded[split]
    return loaded


def _undecoded(table: "Dataset", column: str, name: str) -> "Dataset":
    """The column of pictures alone, as bytes or paths: how they are opened is our own affair."""
    from datasets import Image, Value

    feature = table.features[column]
    pictures = table.select_columns([column])
    if isinstance(feature, Image):
        return pictures.cast_column(column, Image(decode=False))
    stored_alike = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    if not stored_alike and feature not in (Value("binary"), Value("large_binary")):
        raise DataError(f"the column {column} of the dataset {name} holds no pictures, but {feature}")
    return pictures


def _texts(cell: Any, name: str) -> list[str]:
    texts = [] if cell is None else [cell] if isinstance(cell, str) else list(cell)
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"a text of the dataset {name} is neither a string nor a list of strings: {cell!r}")
    return texts


def _labels(table: "Dataset", column: str) -> list[str | None]:
    from datasets import ClassLabel

    feature = table.features[column]
    named = feature.int2str if isinstance(feature, ClassLabel) else str
    # -1 is how the library writes that a class is not known.
    return [None if cell is None or (cell == -1 and named is not str) else named(cell) for cell in table[column]]
