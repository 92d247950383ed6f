"""Run a tower over pictures once, in batches, and keep what every measure needs of them."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from assistant.embeddings import Embedder, processed
from assistant.images import PictureError, open_picture
from assistant.towers import Tower
from training.data.pictures import DataError, pixels_of
from training.evaluation.picture_data import PictureData


@dataclass(frozen=True)
class Features:
    """What a tower makes of B pictures, float32 on the CPU."""

    pooled: Tensor  # (B, D)
    patches: Tensor  # (B, D), the mean of each picture's patches
    embeddings: Tensor | None  # (B, E) of unit length, in the space of texts; None without a text half
    sha256: str  # of the measured pictures as they are stored, with their labels or texts, in their order
    seconds: float


@torch.inference_mode()
def compute_features(
    tower: Tower, embedder: Embedder | None, data: PictureData, batch: int, device: torch.device, bf16: bool = False
) -> Features:
    """The features of every chosen picture, `batch` at a time; a bar on the terminal shows how far it is.

    With an `embedder`, `tower` is the one inside it, and runs once for features and embeddings. Pictures are resized
    as the tower's own image processor says. Raises DataError naming the first picture that cannot be read: a score is
    of all pictures or of none.
    """
    started = time.perf_counter()
    pooled, patches, embeddings = [], [], []
    digest = hashlib.sha256()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        starts = range(0, len(data.chosen), batch)
        for start in track(starts, description=f"features of {data.name}", console=Console(stderr=True)):
            places = data.chosen[start : start + batch]
            views = torch.cat(list(pool.map(lambda place: _view(tower, data, place), places)))
            for place in places:
                digest.update(_digest(data, place))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                output = tower(views.to(device))
            pooled.append(output.pooled.float())
            patches.append(output.patches.float().mean(1))
            if embedder is not None:
                embeddings.append(embedder.of_pooled(pooled[-1]))
    joined = torch.cat(embeddings).cpu() if embedder is not None else None
    seconds = time.perf_counter() - started
    return Features(torch.cat(pooled).cpu(), torch.cat(patches).cpu(), joined, digest.hexdigest(), seconds)


def _view(tower: Tower, data: PictureData, place: int) -> Tensor:
    """float32 (1, 3, H, W) as `tower` wants it."""
    name = data.encoded.catalogue.name(place)
    try:
        picture = open_picture(data.encoded.content(place), name=name)
    except PictureError as error:
        raise DataError(f"{error} Mend it or take it out: a score is of all pictures or of none.") from error
    return processed(tower.image_processor, [pixels_of(picture)])


def _digest(data: PictureData, place: int) -> bytes:
    content = data.encoded.content(place)
    stored = content.read_bytes() if isinstance(content, Path) else content
    catalogue = data.encoded.catalogue
    said = [catalogue.label(place)] if data.use == "labels" else catalogue.texts(place, data.use)
    return hashlib.sha256(stored).digest() + hashlib.sha256(repr(said).encode()).digest()
