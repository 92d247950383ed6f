"""Tell what one picture becomes for a model: one square, or LLaVA-NeXT's base view and tiles, and how many tokens."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import BaseImageProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from assistant.models import ModelError
from assistant.tower_shapes import output_side

Processor: TypeAlias = LlavaProcessor | LlavaNextProcessor
Grid = tuple[int, int]  # rows and columns of tiles
Size = tuple[int, int]  # height and width of a picture in pixels


def is_tiled(processor: Processor) -> bool:
    """Whether `processor` cuts pictures into tiles."""
    return isinstance(processor, LlavaNextProcessor)


def tiled_image_processor(square: BaseImageProcessor, grids: Sequence[Grid]) -> LlavaNextImageProcessor:
    """Makes of a picture what `square` makes of it, and behind that the tiles of the best of `grids`.

    The best grid shows the most of the picture's own pixels, and of those that show as many wastes the least; the
    picture is fitted into it with its own aspect ratio and black beside it. Raises ModelError for a grid without tiles.
    """
    if not grids or any(rows < 1 or columns < 1 for rows, columns in grids):
        raise ModelError(f"tiles: a grid is so many rows and columns of tiles, one or more each, not {list(grids)}")
    side = output_side(square)
    return LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=square.resample,
        rescale_factor=square.rescale_factor,
        image_mean=list(square.image_mean),
        image_std=list(square.image_std),
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in grids],
    )


def grids_of(processor: LlavaNextProcessor) -> list[Grid]:
    """The grids that `processor` cuts pictures by, in its order."""
    side = output_side(processor.image_processor)
    return [(height // side, width // side) for height, width in processor.image_processor.image_grid_pinpoints]


def tokens_per_picture(processor: Processor, size: Size | None = None) -> int:
    """How many tokens one picture takes: N patches of a square, or, cut into tiles, as many as its `size` asks for.

    With tiles they are the patches of the base view, then row by row those patches of all tiles together that show the
    picture and not the black beside it, with a newline behind each row (LLaVA-NeXT, Liu et al. 2024, "spatial_unpad").
    Raises ValueError where the number hangs on a size that is not said.
    """
    patches = int(output_side(processor.image_processor) // processor.patch_size)
    if not is_tiled(processor):
        return patches**2
    if size is None:
        raise ValueError("the model cuts pictures into tiles, so its tokens of a picture hang on the size: say it")
    rows, columns = _seen_patches(size, _grid(processor, size), patches)
    return patches**2 + rows * (columns + 1)


def most_tokens_per_picture(processor: Processor) -> int:
    """Of all sizes; with tiles, of a picture that fills its grid."""
    if not is_tiled(processor):
        return tokens_per_picture(processor)
    patches = int(output_side(processor.image_processor) // processor.patch_size)
    return max(patches**2 * (1 + rows * columns) + patches * rows for rows, columns in grids_of(processor))


def most_views(processor: Processor) -> int:
    """How many squares the tower sees of one picture at most."""
    return 1 + max(rows * columns for rows, columns in grids_of(processor)) if is_tiled(processor) else 1


def size_of(picture: Tensor) -> Size:
    """Height and width of `picture` (3, H, W)."""
    height, width = picture.shape[-2:]
    return height, width


def token_counts(processor: Processor, pictures: Sequence[Tensor]) -> list[int]:
    """How many tokens each of `pictures`, (3, H, W) as the processor gets it, takes."""
    return [tokens_per_picture(processor, size_of(picture)) for picture in pictures]


def cut(processor: Processor, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What the tower sees of `pictures`, uint8 (B, 3, side, side), and their own sizes (pictures, 2), height first.

    Without tiles these are the pictures themselves, which have to be squares of the tower's side, and sizes are None.
    With tiles a picture is uint8 (3, H, W) and gives its base view and then its tiles, row by row.
    """
    if not is_tiled(processor):
        return torch.stack(list(pictures)), None
    # One by one: together they would all be filled up to the number of tiles of the largest.
    views = [
        processor.image_processor(
            [picture],
            do_rescale=False,
            do_normalize=False,
            input_data_format="channels_first",
            return_tensors="pt",
        )["pixel_values"][0]
        for picture in pictures
    ]
    return torch.cat(views), torch.tensor([size_of(picture) for picture in pictures])


def _grid(processor: LlavaNextProcessor, size: Size) -> Grid:
    image_processor = processor.image_processor
    pinpoints = [list(pinpoint) for pinpoint in image_processor.image_grid_pinpoints]
    rows, columns = get_anyres_image_grid_shape(list(size), pinpoints, output_side(image_processor))
    return rows, columns


def _seen_patches(size: Size, grid: Grid, patches: int) -> Grid:
    """Rows and columns of patches that show a picture of `size` which fills `grid`, of `patches` a tile's side."""
    height, width = size
    rows, columns = grid[0] * patches, grid[1] * patches
    if width / height > columns / rows:
        kept = int(round(height * (columns / width), 7))
        return rows - 2 * ((rows - kept) // 2), columns
    kept = int(round(width * (rows / height), 7))
    return rows, columns - 2 * ((columns - kept) // 2)
