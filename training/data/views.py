"""Make views of a picture: resize as the processor does, crop and mirror at random."""

import math

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

SIDED_WORDS = ("left", "right")


def square(pixels: torch.Tensor, side: int | None) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, side, side), the same bilinear, antialiased resize as the shipped processor.

    Where `side` is None the picture stays as it is, for a model that cuts it into tiles by itself.
    """
    if side is None or pixels.shape[-2:] == (side, side):
        return pixels
    return functional.resize(pixels, [side, side], InterpolationMode.BILINEAR, antialias=True)


def random_view(
    pixels: torch.Tensor, side: int | None, generator: np.random.Generator, smallest_area: float, may_mirror: bool
) -> torch.Tensor:
    """A crop of random area (`smallest_area` to 1) and slightly random aspect, resized, mirrored half the time.

    uint8 (3, H, W) -> uint8 (3, side, side), see `square`. All chance comes from `generator`.
    """
    height, width = pixels.shape[-2:]
    area = generator.uniform(smallest_area, 1.0)
    stretch = math.exp(generator.uniform(-0.15, 0.15))
    crop_height = min(height, max(1, round(height * math.sqrt(area) * stretch)))
    crop_width = min(width, max(1, round(width * math.sqrt(area) / stretch)))
    top = int(generator.integers(0, height - crop_height + 1))
    left = int(generator.integers(0, width - crop_width + 1))
    crop = pixels[:, top : top + crop_height, left : left + crop_width]
    view = square(crop, side)
    return view.flip(-1) if may_mirror and generator.random() < 0.5 else view


def mirrors_safely(text: str) -> bool:
    """Whether `text` stays true of the mirrored picture: it names neither left nor right."""
    lowered = text.lower()
    return not any(word in lowered for word in SIDED_WORDS)
