"""Keep decoded pictures as uint8: in memory that data workers share, or in a file that outlives the run."""

import fcntl
import hashlib
import json
import logging
import mmap
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEFAULT_MEMORY = 2 * 2**30  # bytes of pixels that one source keeps in memory
LAYOUT = 1  # of the cache's files; another number, and older files are left alone
CHUNK = 256  # pictures that are decoded before the next ones are handed to the threads

log = logging.getLogger(__name__)


def shared_zeros(shape: tuple[int, ...], kind: type[np.generic]) -> np.ndarray:
    """Zeros that a process shares with the workers it forks. Pages cost memory only once they are written."""
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=kind, count=int(np.prod(shape))).reshape(shape)


class PixelMemory:
    """Up to `budget` bytes of pixels of `count` pictures, shared with forked workers.

    What is in stays in: a run visits every picture once before any twice, and throwing out the oldest would then throw
    out exactly what comes next. A worker that is started in another way than by fork keeps pictures of its own.
    """

    def __init__(self, count: int, budget: int = DEFAULT_MEMORY) -> None:
        self.count, self.budget = count, budget
        self._pixels = shared_zeros((budget,), np.uint8)
        self._places = shared_zeros((count, 3), np.int64)  # offset, height, width; height 0: not here
        self._used = shared_zeros((1,), np.int64)
        self._lock = multiprocessing.Lock()

    def __getstate__(self) -> dict[str, int]:
        return {"count": self.count, "budget": self.budget}

    def __setstate__(self, state: dict[str, int]) -> None:
        PixelMemory.__init__(self, **state)

    def get(self, index: int) -> Tensor | None:
        """A copy of the pixels of picture `index`, uint8 (3, H, W), or None when they are not here."""
        offset, height, width = self._places[index]
        if not height:
            return None
        pixels = self._pixels[offset : offset + 3 * height * width]
        return torch.from_numpy(pixels.reshape(3, height, width).copy())

    def put(self, index: int, pixels: Tensor) -> None:
        """Keep the pixels of picture `index` if there is room."""
        with self._lock:
            offset = int(self._used[0])
            if self._places[index, 1] or offset + pixels.numel() > self.budget:
                return
            self._used[0] = offset + pixels.numel()
        self._pixels[offset : offset + pixels.numel()] = pixels.numpy().reshape(-1)
        # The height goes last: a reader that sees it sees everything else too.
        self._places[index, [0, 2]] = offset, pixels.shape[2]
        self._places[index, 1] = pixels.shape[1]


class PixelFile:
    """Pixels of pictures in a finished folder of the cache, mapped into memory and shared by all who read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: dict[int, str] = {int(k): v for k, v in json.loads((folder / "damaged.json").read_text()).items()}
        self._places = np.load(folder / "places.npy")
        file = folder / "pixels.bin"
        self._pixels = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)

    def get(self, index: int) -> Tensor | None:
        """A copy of the pixels of picture `index`, uint8 (3, H, W), or None when it is damaged."""
        offset, height, width = self._places[index]
        if not height:
            return None
        pixels = self._pixels[offset : offset + 3 * height * width]
        return torch.from_numpy(np.array(pixels).reshape(3, height, width))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        PixelFile.__init__(self, **state)


def pixel_file(
    cache: Path, key: str, count: int, decode: Callable[[int], Tensor], failed: Callable[[int, str], None]
) -> PixelFile:
    """The finished cache of `count` pictures that `key` names under `cache`; decodes them all once if there is none.

    It is written under another name and renamed when it is whole, so that a run that is killed leaves nothing which a
    later one would take for good. Several processes may ask at once: one writes, the others wait for it. `decode`
    raises ValueError for a damaged picture, and `failed` hears of its index and why.
    """
    folder = cache / hashlib.sha256(f"{LAYOUT} {key}".encode()).hexdigest()[:24]
    cache.mkdir(parents=True, exist_ok=True)
    with _only_one(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _write(folder, count, decode, failed)
    return PixelFile(folder)


@contextmanager
def _only_one(file: Path) -> Iterator[None]:
    # The kernel lets go of the lock when its holder dies, so a killed run blocks nobody.
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(folder: Path, count: int, decode: Callable[[int], Tensor], failed: Callable[[int, str], None]) -> None:
    aside = folder.with_suffix(".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    places = np.zeros((count, 3), np.int64)
    damaged: dict[int, str] = {}
    offset = 0
    log.info("decoding %d pictures into %s", count, folder)
    try:
        with (aside / "pixels.bin").open("wb") as file:
            for index, pixels in enumerate(_decoded(count, decode)):
                if isinstance(pixels, str):
                    damaged[index] = pixels
                    failed(index, pixels)
                    continue
                places[index] = offset, pixels.shape[1], pixels.shape[2]
                offset += file.write(pixels.numpy().tobytes())
        np.save(aside / "places.npy", places)
        (aside / "damaged.json").write_text(json.dumps(damaged))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _decoded(count: int, decode: Callable[[int], Tensor]) -> Iterator[Tensor | str]:
    """Every picture in order, or why it cannot be read. Pillow decodes outside of Python's lock, so threads help."""

    def attempt(index: int) -> Tensor | str:
        try:
            return decode(index)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, count, CHUNK):
            yield from pool.map(attempt, range(start, min(start + CHUNK, count)))
