"""Read the rows of a file or a dataset one by one, whatever holds them: JSON lines, a JSON list, CSV, or a table."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.data.catalogue import stamp_of
from training.data.conversations import RowError
from training.data.hub_datasets import load_split
from training.data.pictures import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\n\r]*")
DELIMITERS = (",", ";", "\t")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


class Records(Protocol):
    """Rows by index; nothing of a row is read before it is asked for, so that worker processes share no objects."""

    kind: str  # what holds them, in words
    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The fields of row `index`. Raises RowError where it is not readable."""

    def place(self, index: int) -> str:
        """Where row `index` is found, in words: `row 17 (line 18)`."""

    def stamp(self) -> str:
        """A text that is another one as soon as the rows may be others."""


def open_records(source: Path | str, split: str = "train") -> Records:
    """The rows of a file, a folder of a saved dataset, or (a text that is no path) a dataset on the hub.

    What a file is, its content says and not its name. Raises DataError when there is nothing to read or none of the
    kinds fits.
    """
    path = Path(source).expanduser()
    if path.is_dir() or not path.exists():
        if not path.is_dir() and (isinstance(source, Path) or _looks_like_a_path(str(source))):
            raise DataError(f"there is no file {source}")
        return TableRecords(path if path.is_dir() else str(source), split)
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        return TableRecords(path, split)
    _require_text(path, start)
    first = start.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if not first:
        raise DataError(f"{path} is empty")
    if first == b"[":
        return ListRecords(path)
    return LineRecords(path) if first == b"{" else CsvRecords(path)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith(("/", "~", ".")) or name.count("/") > 1 or name.endswith(SUFFIXES)


def _require_text(path: Path, start: bytes) -> None:
    for mark, what in ((b"\x1f\x8b", "packed by gzip; unpack it"), (b"PK\x03\x04", "a zip file; unpack it")):
        if start.startswith(mark):
            raise DataError(f"{path} is {what} first")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    if b"\0" in start:
        raise DataError(f"{path} is no text, and no Parquet file either")


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}, byte {error.start}); save it as UTF-8") from error


class _Pieces:
    """Rows that lie between two offsets of a file each."""

    kind: str

    def __init__(self, path: Path, starts: Sequence[int], ends: Sequence[int], lines: Sequence[int]) -> None:
        self.name = str(path)
        self.path = path
        self._starts, self._ends = np.asarray(starts, np.int64), np.asarray(ends, np.int64)
        self._lines = np.asarray(lines, np.int64)
        self._stamp = stamp_of([path])
        if not len(self._starts):
            raise DataError(f"{path} holds no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The fields of row `index`."""
        with self.path.open("rb") as file:
            file.seek(int(self._starts[index]))
            content = file.read(int(self._ends[index] - self._starts[index]))
        try:
            fields = json.loads(content.decode())
        except UnicodeDecodeError as error:
            wrong = f"it is not UTF-8 ({error.reason}, byte {error.start} of the row)"
            raise RowError("not JSON", "row", wrong, "save it as UTF-8") from error
        except json.JSONDecodeError as error:
            wrong = f"it is not JSON: {error.msg}, column {error.colno}"
            if self.stamp() != self._stamp:
                raise DataError(f"{self.path} was changed while it was read; start again") from error
            raise RowError("not JSON", "row", wrong, "mend the line or take it out") from error
        except RecursionError as error:
            raise RowError("not JSON", "row", "it is nested too deep", "take the row out") from error
        if not isinstance(fields, dict):
            wrong = f"the row is no object with fields, but {fields!r:.60}"
            raise RowError("not a conversation", "row", wrong, "write {...} with its fields")
        return fields

    def place(self, index: int) -> str:
        """Row and line, both counted from 1."""
        return f"row {index + 1} (line {self._lines[index]})"

    def stamp(self) -> str:
        """Name, size and time of the file."""
        return stamp_of([self.path])


class LineRecords(_Pieces):
    """A JSON object on each line."""

    kind = "JSON lines"

    def __init__(self, path: Path) -> None:
        starts, ends, lines = [], [], []
        offset = 0
        with path.open("rb") as file:
            for line, content in enumerate(file, 1):
                bare = content.removeprefix(BYTE_ORDER_MARK) if line == 1 else content
                if bare.strip():
                    starts.append(offset + len(content) - len(bare))
                    ends.append(offset + len(content))
                    lines.append(line)
                offset += len(content)
        super().__init__(path, starts, ends, lines)


class ListRecords(_Pieces):
    """One JSON list of objects."""

    kind = "a JSON list"

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        text = _decoded(path, content)
        starts, ends, lines = [], [], []
        seen, offset, line = 0, len(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else 0, 1
        del content
        for start, end in _elements(path, text):
            offset += len(text[seen:start].encode())
            line += text.count("\n", seen, start)
            starts.append(offset)
            lines.append(line)
            offset += len(text[start:end].encode())
            line += text.count("\n", start, end)
            ends.append(offset)
            seen = end
        super().__init__(path, starts, ends, lines)


def _elements(path: Path, text: str) -> Iterator[tuple[int, int]]:
    """Where each element of the list that `text` is begins and ends."""
    decoder = json.JSONDecoder()
    try:
        place = _end_of_space(text, text.index("[") + 1)
        while text[place : place + 1] != "]":
            _, end = decoder.raw_decode(text, place)
            yield place, end
            place = _end_of_space(text, end)
            if text[place : place + 1] == ",":
                place = _end_of_space(text, place + 1)
            elif text[place : place + 1] != "]":
                raise json.JSONDecodeError("expecting , or ]", text, place)
        if text[place + 1 :].strip():
            raise json.JSONDecodeError("something stands behind the list", text, place + 1)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}. Rows behind a broken one "
            "in a list cannot be read; mend it there, or write one object a line (.jsonl)"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: a row is nested too deep to be read") from error


def _end_of_space(text: str, place: int) -> int:
    found = SPACE.match(text, place)
    return found.end() if found else place


class CsvRecords:
    """A table with a header; comma, semicolon or tab between its cells."""

    kind = "CSV"

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        text = _decoded(path, path.read_bytes())
        head = text.splitlines()[0]
        delimiter = max(DELIMITERS, key=head.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            self.header = [cell.strip() for cell in next(reader)]
            self._rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise DataError(f"{path} is not CSV: {error} in line {reader.line_num}") from error
        if not self._rows:
            raise DataError(f"{path} has a header ({', '.join(self.header)[:200]}) and no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The cells of row `index`."""
        _, cells = self._rows[index]
        if len(cells) != len(self.header):
            wrong = f"it has {len(cells)} cells, and the header has {len(self.header)}"
            raise RowError("not a conversation", "row", wrong, "put quotes around texts that hold the separator")
        return dict(zip(self.header, cells, strict=True))

    def place(self, index: int) -> str:
        """Row, and the line where it ends, both counted from 1."""
        return f"row {index + 1} (line {self._rows[index][0]})"

    def stamp(self) -> str:
        """Name, size and time of the file."""
        return stamp_of([self.path])


class TableRecords:
    """One split of a dataset, or a Parquet file; pictures stay encoded."""

    def __init__(self, source: Path | str, split: str) -> None:
        self.name = str(source)
        self.kind = "Parquet" if isinstance(source, Path) and source.is_file() else "a dataset"
        # As Arrow, pictures stay bytes or paths: how they are opened is our own affair.
        self.table = load_split(source, split).with_format("arrow")
        if not len(self.table):
            raise DataError(f"the dataset {source}, split {split}, holds no rows")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of row `index`; those that hold nothing are left out."""
        (row,) = self.table[index : index + 1].to_pylist()
        return {name: cell for name, cell in row.items() if cell is not None}

    def place(self, index: int) -> str:
        """The row, counted from 1."""
        return f"row {index + 1}"

    def stamp(self) -> str:
        """Names, sizes and times of the files that the table lies in."""
        return f"{self.name} " + stamp_of([Path(file["filename"]) for file in self.table.cache_files])
