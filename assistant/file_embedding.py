"""Embed many picture files: decoding goes on in threads while the tower works."""

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from assistant.embeddings import Embedder, processed
from assistant.hashing import file_hash
from assistant.images import PictureError, open_picture

BATCH = 32
BATCHES_AHEAD = 2  # decoded beside the one that the tower looks at
SPARE = 2  # a large JPEG is decoded at no less than so many times the side that the tower sees


def embed_files(
    embedder: Embedder, files: Iterable[Path], batch: int = BATCH
) -> Iterator[tuple[Path, Tensor | PictureError]]:
    """Each file with its embedding (D,) of unit length on the CPU, or with what is wrong with it, in the given order.

    `batch` pictures go through the tower at once; damaged ones leave their places to others.
    """
    ahead = batch * BATCHES_AHEAD
    remaining = iter(files)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        waiting: list[tuple[Path, Future[Tensor | PictureError]]] = []
        while True:
            wanted = itertools.islice(remaining, batch + ahead - len(waiting))
            waiting += [(file, pool.submit(_pixels, embedder, file)) for file in wanted]
            if not waiting:
                return
            some, waiting = waiting[:batch], waiting[batch:]
            yield from _embedded(embedder, [(file, future.result()) for file, future in some])


def _embedded(
    embedder: Embedder, opened: list[tuple[Path, Tensor | PictureError]]
) -> Iterator[tuple[Path, Tensor | PictureError]]:
    good = [pixels for _, pixels in opened if isinstance(pixels, Tensor)]
    vectors: Iterator[Tensor] = iter(())
    if good:
        with torch.inference_mode():
            pooled = embedder.tower(torch.cat(good).to(embedder.device)).pooled
            vectors = iter(embedder.of_pooled(pooled).cpu())
    for file, pixels in opened:
        yield file, next(vectors) if isinstance(pixels, Tensor) else pixels


def _pixels(embedder: Embedder, file: Path) -> Tensor | PictureError:
    """float32 (1, 3, H, W) as the tower wants it, or what is wrong with the file."""
    try:
        picture = open_picture(file, enough=SPARE * embedder.tower.image_side)
    except PictureError as error:
        return error
    return processed(embedder.tower.image_processor, [torch.from_numpy(np.array(picture)).permute(2, 0, 1)])


def file_hashes(files: Iterable[Path]) -> Iterator[tuple[Path, str | OSError]]:
    """Each file with the sha256 of its bytes, or why it cannot be read, in the given order; read in threads."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        files = list(files)
        yield from zip(files, pool.map(_hash, files), strict=True)


def _hash(file: Path) -> str | OSError:
    try:
        return file_hash(file)
    except OSError as error:
        return error
