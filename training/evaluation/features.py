"""Run a tower over pictures once, in batches, and keep what every measure needs of them."""

import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from assistant.batching import in_batches
from assistant.embeddings import Embedder
from assistant.images import PictureError, open_picture, read_picture
from assistant.pixels import pixels_of, processed
from assistant.towers import Tower
from training.data.pictures import DataError
from training.evaluation.feature_store import FeatureStore, Row
from training.evaluation.picture_data import PictureData

EMBEDDED_AT_ONCE = 4096


@dataclass(frozen=True)
class Features:
    """What a tower makes of B pictures, float32 on the CPU."""

    pooled: Tensor  # (B, D)
    patches: Tensor  # (B, D), the mean of each picture's patches
    embeddings: Tensor | None  # (B, E) of unit length, in the space of texts; None without a text half
    sha256: str  # of the measured pictures as they are stored, with their labels or texts, in their order
    seconds: float
    reused: int = 0  # how many of them came out of the store


def compute_features(
    tower: Tower,
    embedder: Embedder | None,
    data: PictureData,
    batch: int,
    device: torch.device,
    bf16: bool = False,
    store: FeatureStore | None = None,
) -> Features:
    """The features of every chosen picture, `batch` at a time; a bar on the terminal shows how far it is.

    With an `embedder`, `tower` is the one inside it, and runs once for features and embeddings. Pictures are resized
    as the tower's own image processor says, from every pixel of theirs. Those that are in `store` are not decoded, and
    the tower does not see them; the others are added to it. Raises DataError naming the first picture that cannot be
    read: a score is of all pictures or of none.
    """
    started = time.perf_counter()
    contents: dict[int, bytes] = {}
    computed = 0

    def prepare(place: int) -> Tensor | Row:
        try:
            stored = _stored(data, place)
            contents[place] = hashlib.sha256(stored).digest()
            kept = store.get(contents[place]) if store else None
            return kept or _view(tower, stored, data.encoded.catalogue.name(place))
        except PictureError as error:
            raise DataError(f"{error} Mend it or take it out: a score is of all pictures or of none.") from error

    @torch.inference_mode()
    def run(views: Tensor) -> list[Row]:
        nonlocal computed
        computed += len(views)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = tower(views.to(device))
        pooled, patches = output.pooled.float().cpu(), output.patches.float().mean(1).cpu()
        return [Row(*row) for row in zip(pooled, patches, strict=True)]

    rows = []
    with store or nullcontext():
        found = in_batches(data.chosen, prepare, run, batch)
        console = Console(stderr=True)
        for place, row in track(found, f"features of {data.name}", total=len(data.chosen), console=console):
            rows.append(row)
            if store:
                store.add(contents[place], row)
    pooled, patches = (torch.stack([getattr(row, part) for row in rows]) for part in ("pooled", "patches"))
    embeddings = _embeddings(embedder, pooled, device) if embedder else None
    digest = _digest(data, contents)
    return Features(pooled, patches, embeddings, digest, time.perf_counter() - started, len(rows) - computed)


def _embeddings(embedder: Embedder, pooled: Tensor, device: torch.device) -> Tensor:
    return torch.cat([embedder.of_pooled(some.to(device)).cpu() for some in pooled.split(EMBEDDED_AT_ONCE)])


def _stored(data: PictureData, place: int) -> bytes:
    content = data.encoded.content(place)
    return read_picture(content, name=data.encoded.catalogue.name(place)) if isinstance(content, Path) else content


def _view(tower: Tower, stored: bytes, name: str) -> Tensor:
    """float32 (1, 3, H, W) as `tower` wants it."""
    return processed(tower.image_processor, [pixels_of(open_picture(stored, name=name))])


def _digest(data: PictureData, contents: dict[int, bytes]) -> str:
    digest = hashlib.sha256()
    catalogue = data.encoded.catalogue
    for place in data.chosen:
        said = [catalogue.label(place)] if data.use == "labels" else catalogue.texts(place, data.use)
        digest.update(contents[place] + hashlib.sha256(repr(said).encode()).digest())
    return digest.hexdigest()
