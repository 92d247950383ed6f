"""Look through a tower at some pictures: one sheet of what it attends to and what it tells apart."""

from collections.abc import Sequence
from pathlib import Path

import torch

from assistant.images import open_picture
from assistant.towers import Tower
from training.data.pictures import pixels_of
from training.data.views import square
from training.evaluation.drawing import draw_sheet
from training.evaluation.looking import attention_maps, patch_colours


def look(tower: Tower, files: Sequence[Path], out: Path, side: int | None = None) -> None:
    """Write the sheet of `files` to `out`: a row each, as squares of `side` pixels (the tower's own where None).

    A larger side gives a finer grid. Raises PictureError naming a picture that cannot be read, and ValueError for a
    side that the tower's patches do not divide.
    """
    side = side or tower.image_side
    if side % tower.patch_size:
        raise ValueError(f"--side {side} does not divide into patches of {tower.patch_size}")
    views = torch.stack([square(pixels_of(open_picture(file)), side) for file in files])
    maps = attention_maps(tower, views) if tower.has_patch_tokens else None
    with torch.inference_mode():
        patches = tower(tower.normalise(views)).patches.unflatten(1, tower.grid(side, side))
    draw_sheet(views, [file.name for file in files], maps, patch_colours(patches), out)
