"""Keep captions of picture files as JSON lines, so that a run that was stopped, in whatever way, goes on with them."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, Self

KEYS = ("image", "caption", "sha256", "model", "style")
LINE_START = b'{"image": '


class CaptionFileError(ValueError):
    """The file cannot be gone on with; the message says why and the way out."""


class CaptionFile:
    """One line for each picture: `{"image", "caption", "sha256", "model", "style"}`, and `image` relative to the file.

    Training reads it as it is (`captions:` in a recipe). It is open for one program at a time; use it in a `with`.

    Raises:
        CaptionFileError: it cannot be written, another program writes it, it holds something else, or captions of
            another model or style.
    """

    def __init__(self, path: Path, model: str, style: str) -> None:
        self.path = path.absolute()
        self.model = model
        self.style = style
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise CaptionFileError(f"{path} cannot be written: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise CaptionFileError(
                f"{path}: another program writes to it; wait for it, or choose another --out"
            ) from error
        self._hashes: dict[str, str] = {}
        self._captions: dict[str, str] = {}
        try:
            self._take_in()
        except CaptionFileError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._hashes)

    def name_of(self, picture: Path) -> str:
        """What the file calls a picture."""
        return os.path.relpath(picture.absolute(), self.path.parent)

    def has(self, picture: Path, sha256: str) -> bool:
        """Whether this picture with this content has its line."""
        return self._hashes.get(self.name_of(picture)) == sha256

    def caption_of(self, sha256: str) -> str | None:
        """The caption of a picture with this content, under whatever name."""
        return self._captions.get(sha256)

    def add(self, picture: Path, sha256: str, caption: str) -> None:
        """Write the picture's line; the system has it when this returns. A picture that changed loses its old line."""
        name = self.name_of(picture)
        if name in self._hashes:
            self._rewrite([record for record in self._records() if record["image"] != name])
        record = {"image": name, "caption": caption, "sha256": sha256, "model": self.model, "style": self.style}
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self._hashes[name] = sha256
        self._captions[sha256] = caption

    def _take_in(self) -> None:
        for number, record in enumerate(self._records(), 1):
            made = (record["model"], record["style"])
            if made != (self.model, self.style):
                raise CaptionFileError(
                    f"{self.path}, line {number}: made by {made[0]} in style {made[1]}, and {self.model} in style "
                    f"{self.style} is asked for now; choose another --out"
                )
            self._hashes[record["image"]] = record["sha256"]
            self._captions[record["sha256"]] = record["caption"]

    def _records(self) -> list[dict[str, Any]]:
        """What the whole lines say. Half a line, which a program that was killed left at the end, is cut off."""
        self._file.seek(0)
        whole, _, half = self._file.read().rpartition(b"\n")
        records = [self._record(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if half:
            if not (half.startswith(LINE_START) or LINE_START.startswith(half)):
                raise CaptionFileError(f"{self.path}: its end is no caption of ours; choose another --out")
            self._file.truncate(len(whole) + 1 if whole else 0)
        return records

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in KEYS):
            raise CaptionFileError(f"{self.path}, line {number}: this is no caption of ours; choose another --out")
        return record

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        """Written beside and moved over the old file, so that a stop in between loses nothing."""
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        fresh = beside.open("a+b")
        fcntl.flock(fresh, fcntl.LOCK_EX)
        beside.replace(self.path)
        self._file.close()
        self._file = fresh
