"""Embed many picture files: decoding goes on in threads while the tower works."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from assistant.batching import in_batches
from assistant.embeddings import Embedder
from assistant.hashing import file_hash
from assistant.images import DEFAULT_LIMITS, PictureError, PictureLimits, open_picture
from assistant.pixels import pixels_of, processed
from assistant.towers import Tower

BATCH = 32
SPARE = 2  # a large JPEG is decoded at no less than so many times the side that the tower sees


def embed_files(
    embedder: Embedder, files: Iterable[Path], batch: int = BATCH
) -> Iterator[tuple[Path, Tensor | PictureError]]:
    """Each file with its embedding (D,) of unit length on the CPU, or with what is wrong with it, in the given order.

    `batch` pictures go through the tower at once; damaged ones leave their places to others.
    """

    @torch.inference_mode()
    def embedded(views: Tensor) -> Tensor:
        return embedder.of_pooled(embedder.tower(views.to(embedder.device)).pooled).cpu()

    return in_batches(files, lambda file: opened_for(embedder.tower, file), embedded, batch)


def opened_for(tower: Tower, file: Path | bytes, limits: PictureLimits = DEFAULT_LIMITS) -> Tensor | PictureError:
    """float32 (1, 3, H, W) as `tower` wants it, or what is wrong with the file (or its bytes)."""
    try:
        picture = open_picture(file, limits, enough=SPARE * tower.image_side)
    except PictureError as error:
        return error
    return processed(tower.image_processor, [pixels_of(picture)])


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
