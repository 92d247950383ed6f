"""Draw random views of a picture for objectives that compare or hide them: crops, colours, blurs and block masks.

Pictures and views are uint8 (3, H, W). All chance comes from the numpy generator that is handed in, so a place of a run
names its views. Pixels are moved by torchvision's functional transforms; what we own is only which numbers are drawn.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

Range = tuple[float, float]

CROP_TRIES = 10  # as torchvision's RandomResizedCrop
BLUR_DEVIATIONS = (0.1, 2.0)  # pixels (SimCLR, appendix A)
SOLARISE_FROM = 128
SMALLEST_BLOCK = 4  # patches (BEiT, algorithm 1, takes 16 of 196; iBOT and DINOv2 take 4)
BLOCK_ASPECT = 0.3  # narrowest block, height to width or width to height (BEiT, iBOT, DINOv2)
BLOCK_TRIES = 10


def crop_box(
    height: int, width: int, generator: np.random.Generator, area: Range, aspect: Range = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box: even in `area` (share), even in the logarithm of `aspect`.

    The distribution of torchvision's RandomResizedCrop (Szegedy et al. 2015): a box that does not fit is drawn again,
    and after ten tries the largest box in the middle is taken whose aspect is allowed. So a box never leaves the
    picture, however narrow that is. Raises ValueError for an area outside 0 to 1.
    """
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"the area of a crop is {area}, and has to be two rising shares above 0 and up to 1")
    for _ in range(CROP_TRIES):
        pixels = height * width * generator.uniform(*area)
        ratio = math.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(generator.integers(height - box_height + 1))
            left = int(generator.integers(width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, max(1, round(width / aspect[0])))
    box_width = min(width, max(1, round(height * aspect[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_crop(
    pixels: Tensor, side: int, generator: np.random.Generator, area: Range, aspect: Range = (3 / 4, 4 / 3)
) -> Tensor:
    """A random box of the picture (`crop_box`), resized to (3, side, side), bicubic and antialiased."""
    box = crop_box(pixels.shape[-2], pixels.shape[-1], generator, area, aspect)
    return functional.resized_crop(pixels, *box, [side, side], InterpolationMode.BICUBIC, antialias=True)


def mirror(view: Tensor, generator: np.random.Generator, chance: float = 0.5) -> Tensor:
    """Left for right. Whether words still hold of the mirrored picture is for the caller to ask first."""
    return functional.horizontal_flip(view) if generator.random() < chance else view


def jitter(
    view: Tensor, generator: np.random.Generator, strength: float, chance: float = 0.8, saturation: float = 0.8
) -> Tensor:
    """Brightness, contrast, saturation and hue moved in random order (SimCLR, appendix A).

    At `strength` s the factors of brightness and contrast are even in 1 - 0.8 s to 1 + 0.8 s (never below 0), that of
    saturation in 1 -+ `saturation` s (SimCLR 0.8; BYOL 0.4 at s = 0.5), and hue turns by up to 0.2 s of the circle.
    """
    if generator.random() >= chance:
        return view
    brightness, contrast = (_factor(0.8 * strength, generator) for _ in range(2))
    colour = _factor(saturation * strength, generator)
    turn = float(generator.uniform(-0.2, 0.2)) * strength
    return adjust(view, brightness, contrast, colour, turn, generator.permutation(4))


def adjust(
    view: Tensor, brightness: float, contrast: float, saturation: float, hue: float, order: np.ndarray
) -> Tensor:
    """Four changes of colour, applied in `order` (a permutation of 0 to 3 over the arguments as they stand)."""
    for change in order:
        if change == 0:
            view = functional.adjust_brightness(view, brightness)
        elif change == 1:
            view = functional.adjust_contrast(view, contrast)
        elif change == 2:
            view = functional.adjust_saturation(view, saturation)
        else:
            view = functional.adjust_hue(view, hue)
    return view


def _factor(spread: float, generator: np.random.Generator) -> float:
    return float(generator.uniform(max(0.0, 1 - spread), 1 + spread))


def grey(view: Tensor, generator: np.random.Generator, chance: float = 0.2) -> Tensor:
    """Three equal channels of brightness."""
    return functional.rgb_to_grayscale(view, num_output_channels=3) if generator.random() < chance else view


def blur(view: Tensor, generator: np.random.Generator, chance: float = 0.5) -> Tensor:
    """A Gaussian blur whose deviation is even in 0.1 to 2 pixels."""
    if generator.random() >= chance:
        return view
    return gaussian_blur(view, float(generator.uniform(*BLUR_DEVIATIONS)))


def gaussian_blur(view: Tensor, deviation: float) -> Tensor:
    """Blur by a Gaussian of `deviation` pixels, cut off at three deviations (and at the edge of a tiny view).

    SimCLR cuts the kernel at a tenth of the side, which at 224 pixels is beyond five deviations: the same pixels. Rows
    and columns are blurred one after the other, which is the same blur at a fraction of the cost.
    """
    radius = min(math.ceil(3 * deviation), min(view.shape[-2:]) - 1)
    size = 2 * radius + 1
    rows = functional.gaussian_blur(view.float(), [size, 1], [deviation, deviation])
    return functional.gaussian_blur(rows, [1, size], [deviation, deviation]).round_().to(torch.uint8)


def solarise(view: Tensor, generator: np.random.Generator, chance: float = 0.2) -> Tensor:
    """Values of 128 and more turned into their opposite (BYOL)."""
    return functional.solarize(view, SOLARISE_FROM) if generator.random() < chance else view


def simclr_view(
    pixels: Tensor, side: int, generator: np.random.Generator, strength: float = 1.0, area: Range = (0.08, 1.0)
) -> Tensor:
    """One view for SimCLR (Chen et al. 2020, appendix A): crop, mirror, jitter, grey, blur. uint8 (3, side, side)."""
    view = mirror(random_crop(pixels, side, generator, area), generator)
    view = grey(jitter(view, generator, strength), generator)
    return blur(view, generator)


def byol_views(
    pixels: Tensor, side: int, generator: np.random.Generator, area: Range = (0.08, 1.0)
) -> tuple[Tensor, Tensor]:
    """The asymmetric pair of BYOL (Grill et al. 2020, table 6), as in MoCo v3 and DINO: two uint8 (3, side, side).

    The first is always blurred; the second is blurred one time in ten and solarised one time in five.
    """
    first = _byol_view(pixels, side, generator, area, blurred=1.0, solarised=0.0)
    return first, _byol_view(pixels, side, generator, area, blurred=0.1, solarised=0.2)


def _byol_view(
    pixels: Tensor, side: int, generator: np.random.Generator, area: Range, blurred: float, solarised: float
) -> Tensor:
    view = mirror(random_crop(pixels, side, generator, area), generator)
    view = grey(jitter(view, generator, strength=0.5, saturation=0.4), generator)
    return solarise(blur(view, generator, blurred), generator, solarised)


def multi_crop(
    pixels: Tensor,
    generator: np.random.Generator,
    *,
    large: int,
    small: int,
    small_count: int,
    large_area: Range = (0.32, 1.0),
    small_area: Range = (0.05, 0.32),
) -> tuple[list[Tensor], list[Tensor]]:
    """DINO's crops (Caron et al. 2021, section 3.1): two (3, large, large) and `small_count` (3, small, small).

    The two large ones are BYOL's pair, small ones are blurred half the time. The areas are DINOv2's.
    """
    pair = list(byol_views(pixels, large, generator, large_area))
    smaller = [_byol_view(pixels, small, generator, small_area, blurred=0.5, solarised=0.0) for _ in range(small_count)]
    return pair, smaller


def block_mask(rows: int, columns: int, share: float, generator: np.random.Generator) -> Tensor:
    """Patches hidden in blocks: bool (rows * columns,), row by row, with exactly round(share * rows * columns) True.

    Blocks are drawn as BEiT's algorithm 1 and iBOT draw them: an area of at least 4 patches and at most what is still
    to hide, an aspect even in its logarithm between 0.3 and 1 / 0.3, at a random place. Those stop short when no block
    fits any more; here the blocks grow by single patches along their edges, so that every sample of a batch hides the
    same number. Raises ValueError for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of hidden patches is {share}, and has to be from 0 to 1")
    wanted = round(share * rows * columns)
    mask = np.zeros((rows, columns), dtype=bool)
    while (missing := wanted - int(mask.sum())) >= SMALLEST_BLOCK:
        if not _add_block(mask, missing, generator):
            break
    while int(mask.sum()) < wanted:
        _add_neighbour(mask, generator)
    return torch.from_numpy(mask.reshape(-1))


def _add_block(mask: np.ndarray, most: int, generator: np.random.Generator) -> bool:
    """Hide one block of 1 to `most` new patches; False when ten tries found none."""
    rows, columns = mask.shape
    for _ in range(BLOCK_TRIES):
        area = generator.uniform(SMALLEST_BLOCK, most)
        aspect = math.exp(generator.uniform(math.log(BLOCK_ASPECT), -math.log(BLOCK_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height <= rows and 0 < width <= columns):
            continue
        top = int(generator.integers(rows - height + 1))
        left = int(generator.integers(columns - width + 1))
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - int(block.sum()) <= most:
            block[:] = True
            return True
    return False


def _add_neighbour(mask: np.ndarray, generator: np.random.Generator) -> None:
    """Hide one patch more: one beside a hidden patch, or any when none is hidden yet."""
    beside = np.zeros_like(mask)
    beside[1:] |= mask[:-1]
    beside[:-1] |= mask[1:]
    beside[:, 1:] |= mask[:, :-1]
    beside[:, :-1] |= mask[:, 1:]
    candidates = np.flatnonzero(beside & ~mask if mask.any() else ~mask)
    mask.reshape(-1)[candidates[generator.integers(len(candidates))]] = True
