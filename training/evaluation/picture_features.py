"""Features of picture files by any tower, and which of them lie nearest to a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from assistant.batching import in_batches
from assistant.file_embedding import BATCH, opened_for
from assistant.images import PictureError
from assistant.nearest import Hit, Searcher
from assistant.towers import Tower
from training.data.pictures import DataError

Features = Literal["pooled", "patches"]


@dataclass(frozen=True)
class FileFeatures:
    """The files that could be read with their features (N, D), of unit length; and what is wrong with the others."""

    files: tuple[Path, ...]
    vectors: Tensor
    damaged: tuple[str, ...]


@torch.inference_mode()
def features_of(tower: Tower, files: Sequence[Path], kind: Features) -> FileFeatures:
    """What `tower` makes of `files`, resized as its image processor says: pooled, or the mean of the patches.

    A bar on the terminal shows how far it is. Raises DataError when none of them can be read.
    """
    device = next(tower.parameters()).device

    def run(views: Tensor) -> Tensor:
        output = tower(views.to(device))
        features = output.pooled if kind == "pooled" else output.patches.mean(1)
        return functional.normalize(features.float(), dim=-1).cpu()

    found: dict[Path, Tensor] = {}
    damaged = []
    made = in_batches(files, lambda file: opened_for(tower, file), run, BATCH)
    console = Console(stderr=True)
    for file, result in track(made, "reading pictures", len(files), console=console, disable=len(files) <= BATCH):
        if isinstance(result, PictureError):
            damaged.append(str(result))
        else:
            found[file] = result
    if not found:
        raise DataError(f"none of {len(files)} pictures can be read; the first: {damaged[0] if damaged else 'none'}")
    return FileFeatures(tuple(found), torch.stack(list(found.values())), tuple(damaged))


def neighbours(asked: FileFeatures, among: FileFeatures, count: int) -> list[list[Hit]]:
    """For each asked picture the `count` nearest of `among` by the cosine of their features; never its own file."""
    searcher = Searcher(among.files, among.vectors.numpy())
    found = []
    for file, vector in zip(asked.files, asked.vectors, strict=True):
        hits = [hit for hit in searcher.nearest(vector, count + 1) if not hit.path.samefile(file)]
        found.append(hits[:count])
    return found
