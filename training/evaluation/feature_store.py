"""Keep what a tower made of pictures, by the content of tower and picture, so that nobody computes it twice."""

import hashlib
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from training.data.pictures import DataError

LAYOUT = 1  # another number whenever the same picture may give other features, or the files hold something else
KEEP_EVERY = 256  # pictures; what a kill loses at most
FORGOTTEN = 3600.0  # seconds after which a file that was never finished is some killed process's


@dataclass(frozen=True)
class Row:
    """What a tower made of one picture, float32 on the CPU."""

    pooled: Tensor  # (D,)
    patches: Tensor  # (D,), the mean over the patches


def default_folder() -> Path:
    """`kangaroo/features` in the user's folder for what can be made again (XDG Base Directory Specification)."""
    named = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (named if named.is_absolute() else Path.home() / ".cache") / "kangaroo" / "features"


class FeatureStore:
    """The features that one tower made at one precision, below `folder`; use it in a `with`, which writes the last.

    Each file holds those of some hundred pictures, is named by the sha256 of its bytes, and is never changed: it is
    written aside and renamed when it is whole. So a process that is killed leaves no half, and any number of processes
    may read and write at once. A file whose bytes are not what its name says is deleted, and `notes` says so.
    """

    def __init__(self, folder: Path, tower: str, precision: str) -> None:
        """`tower` is its `tower_key`. Raises DataError when features cannot be kept in `folder`."""
        self.folder = folder / f"{LAYOUT}-{tower}-{precision}"
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._files: dict[Path, dict[str, Tensor] | None] = {}  # None: not read yet
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._new: dict[bytes, Row] = {}
        self._writes = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise DataError(
                f"features cannot be kept in {folder}: {error.strerror}. Name another folder with --features-folder, "
                "or keep none with --no-keep"
            ) from error
        self._forget_unfinished()
        for file in sorted(self.folder.glob("*.safetensors")):
            self._list(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.write()

    def get(self, content: bytes) -> Row | None:
        """The features of the picture whose bytes have the sha256 `content`, if they are here; any thread may ask."""
        with self._lock:
            if content in self._new:
                return self._new[content]
            if content not in self._places:
                return None
            file, place = self._places[content]
            held = self._files[file]
            if held is None:
                held = self._read(file)
            return Row(held["pooled"][place], held["patches"][place]) if held else None

    def add(self, content: bytes, row: Row) -> None:
        """Keep `row` under the sha256 of its picture's bytes; what is here already stays as it is."""
        with self._lock:
            if content not in self._places and self._writes:
                self._new[content] = row
        if len(self._new) >= KEEP_EVERY:
            self.write()

    def write(self) -> None:
        """Write what was added. A disk that is full ends the keeping, not the measuring, and `notes` says so."""
        with self._lock:
            if not self._new:
                return
            held = {
                "contents": torch.tensor([list(content) for content in self._new], dtype=torch.uint8),
                "pooled": torch.stack([row.pooled for row in self._new.values()]),
                "patches": torch.stack([row.patches for row in self._new.values()]),
            }
            try:
                file = self._write(save(held))
            except OSError as error:
                self._writes = False
                self.notes.append(f"features are not kept any more: {self.folder}: {error.strerror}")
                file = Path()  # nowhere: they are in memory, and go with it
            self._files[file] = held
            self._places |= {content: (file, place) for place, content in enumerate(self._new)}
            self._new.clear()

    def _write(self, content: bytes) -> Path:
        file = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        aside = file.with_suffix(f".{uuid4().hex}.partial")
        try:
            aside.write_bytes(content)
            return aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    def _list(self, file: Path) -> None:
        """Note which pictures `file` has features of; its other bytes are read when the first of them is wanted."""
        try:
            with safe_open(file, "pt") as opened:
                contents = [bytes(row) for row in opened.get_tensor("contents").tolist()]
        except FileNotFoundError:
            return  # another process found it damaged just now
        except (SafetensorError, ValueError) as error:
            self._discard(file, str(error))
            return
        except OSError as error:
            self.notes.append(f"kept features cannot be read and are computed again: {file}: {error.strerror}")
            return
        self._files[file] = None
        self._places |= {content: (file, place) for place, content in enumerate(contents)}

    def _read(self, file: Path) -> dict[str, Tensor] | None:
        try:
            content = file.read_bytes()
        except OSError as error:
            self._discard(file, str(error.strerror))
            return None
        if hashlib.sha256(content).hexdigest() != file.stem:
            self._discard(file, "its bytes are not those that were written")
            return None
        self._files[file] = held = load(content)
        return held

    def _discard(self, file: Path, reason: str) -> None:
        file.unlink(missing_ok=True)
        self._files.pop(file, None)
        self._places = {content: place for content, place in self._places.items() if place[0] != file}
        self.notes.append(f"kept features were damaged and are computed again: {file}: {reason}")

    def _forget_unfinished(self) -> None:
        for file in self.folder.glob("*.partial"):
            try:
                if time.time() - file.stat().st_mtime > FORGOTTEN:
                    file.unlink()
            except OSError:
                continue  # its process finished it just now, or it is another user's
