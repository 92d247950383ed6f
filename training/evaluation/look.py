"""Look through a tower at some pictures: what it attends to, what it tells apart, draws back, and finds alike."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from assistant.images import open_picture
from assistant.models import ModelError
from assistant.nearest import Hit
from assistant.pixels import pixels_of
from assistant.towers import Tower, load_tower
from training.data.folders import FolderPictures
from training.data.pictures import DataError
from training.data.views import square
from training.evaluation.drawing import Cell, draw_sheet
from training.evaluation.embedding_map import label_names, place
from training.evaluation.looking import attention_maps, patch_colours
from training.evaluation.map_drawing import draw_map
from training.evaluation.picture_features import Features, features_of, neighbours
from training.evaluation.reconstruction import Reconstruction, load_masked_autoencoder, reconstruct
from training.objective import check_side
from training.objectives.mae import MaeObjective

MOST_PICTURES = 60  # on a sheet
NEIGHBOUR_SIDE = 256  # pixels of its square
EMPTY = np.full((1, 1, 3), 255, np.uint8)


@dataclass(frozen=True)
class Wanted:
    """What is drawn beside attention and colours."""

    side: int | None = None  # pixels of the square that the tower sees; its own where None
    reconstruct: bool | None = None  # where None: when the tower has a decoder
    among: Path | None = None  # a folder in which neighbours are looked for
    count: int = 6  # of neighbours
    features: Features = "pooled"  # by which they are near
    seed: int = 0  # of the patches that are hidden


def look(source: str, files: Sequence[Path], out: Path, wanted: Wanted) -> list[str]:
    """Write the sheet of `files` to `out`, a line each, and give what there is to say of it in words.

    Raises ModelError for a tower that cannot be loaded or lacks what is wanted, PictureError naming a picture that
    cannot be read, DataError for too many pictures or a folder without any, and ValueError for a side that the tower's
    patches do not divide.
    """
    if len(files) > MOST_PICTURES:
        raise DataError(f"{len(files)} pictures do not fit on a sheet; name at most {MOST_PICTURES}")
    tower, painter = _opened(source, wanted.reconstruct)
    side = wanted.side or tower.image_side
    check_side(tower, side, "--side")
    views = torch.stack([square(pixels_of(open_picture(file)), side) for file in files])
    notes = []
    maps: Sequence[Tensor] | None = None
    if tower.has_patch_tokens:
        maps = [attention_maps(tower, view[None])[0] for view in views]
    else:
        notes.append("this tower is a ResNet: it has no attention to draw, its patches as colours show what it sees")
    with torch.inference_mode():
        patches = torch.cat([tower(tower.normalise(view[None])).patches for view in views])
    colours = patch_colours(patches.unflatten(1, tower.grid(side, side)))
    drawn = reconstruct(painter, views, wanted.seed) if painter else None
    lines = [list(_cells(row, file, views, colours, maps, drawn)) for row, file in enumerate(files)]
    if wanted.among is not None:
        near, left_out = _neighbours(tower, files, wanted.among, wanted)
        lines = [line for pair in zip(lines, near, strict=True) for line in pair]
        notes += left_out
    draw_sheet(lines, out)
    return notes


def plot(source: str, folder: Path, out: Path, features: Features, seed: int) -> list[str]:
    """Write a map of the pictures below `folder` to `out`, and give what there is to say of it in words.

    Raises ModelError for a tower that cannot be loaded, and DataError for a folder with too few pictures.
    """
    tower, _ = _opened(source, None)
    pictures = FolderPictures(folder)
    label_of = dict(zip(pictures.files, label_names(pictures), strict=True))
    found = features_of(tower, pictures.files, features)
    placed = place(found, seed)
    labels = [label_of[file] for file in placed.files]
    draw_map(placed, labels, f"{folder.resolve().name} through {source}", out, seed)
    notes = [f"left out: {reason}" for reason in found.damaged]
    if len(placed.files) < len(found.files):
        notes.append(f"{len(placed.files):,} of {len(found.files):,} pictures are on the map, drawn by lot")
    return notes


def _opened(source: str, wanted: bool | None) -> tuple[Tower, MaeObjective | None]:
    """The tower, and what draws pictures back where it is there and not unwanted."""
    painter = load_masked_autoencoder(source)
    if painter is not None:
        return painter.tower, None if wanted is False else painter
    if wanted:
        raise ModelError(
            f"{source} has no decoder that draws hidden patches: name a tower of `kangaroo train mae` (its decoder "
            "lies beside it) or a ViTMAE such as facebook/vit-mae-base, or leave out --reconstruct"
        )
    return load_tower(source).eval(), None


def _cells(
    row: int, file: Path, views: Tensor, colours: Tensor, maps: Sequence[Tensor] | None, drawn: Reconstruction | None
) -> Iterator[Cell]:
    """The line of one picture; only the first line has titles above its columns."""
    picture = views[row].permute(1, 2, 0).numpy()
    first = row == 0
    yield Cell(picture, file.name)
    if drawn is not None:
        yield Cell(drawn.masked[row].permute(1, 2, 0).numpy(), "what the tower sees" if first else "")
        yield Cell(drawn.drawn[row].permute(1, 2, 0).numpy(), "drawn back" if first else "")
    yield Cell(colours[row].numpy(), "patches" if first else "")
    for head, heat in enumerate(maps[row] if maps is not None else (), start=1):
        yield Cell(picture, f"head {head}" if first else "", heat.numpy())


def _neighbours(
    tower: Tower, files: Sequence[Path], folder: Path, wanted: Wanted
) -> tuple[list[list[Cell]], list[str]]:
    """A line for each of `files` with its neighbours in `folder`, and what is to be said of those left out."""
    known = features_of(tower, FolderPictures(folder).files, wanted.features)
    near = neighbours(features_of(tower, files, wanted.features), known, wanted.count)
    lines = [[_neighbour(hit, folder) for hit in hits] or [Cell(EMPTY, "no other picture there")] for hits in near]
    return lines, [f"left out: {reason}" for reason in known.damaged]


def _neighbour(hit: Hit, folder: Path) -> Cell:
    """The picture in its own shape on a white square, so that all titles of a line stand at one height."""
    picture = open_picture(hit.path, enough=NEIGHBOUR_SIDE)
    padded = ImageOps.pad(picture, (NEIGHBOUR_SIDE, NEIGHBOUR_SIDE), color="white")
    return Cell(np.array(padded), f"{hit.likeness:.3f} {hit.path.relative_to(folder)}")
