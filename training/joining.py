"""Join a tower and a language model that never met, or let a model cut tiles, and leave one that can be taught."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from assistant.checkpoint import convert_weights, load_llava, save_llava
from assistant.exporting import require_unquantised
from assistant.fusion import calibrate_projector, join, with_tiles
from assistant.language_models import load_language_model
from assistant.models import find_model, read_json
from assistant.pixels import pixels_of
from assistant.projectors import Llava, Projector
from assistant.tiles import Grid, Processor, most_tokens_per_picture
from assistant.tower_shapes import output_side
from assistant.towers import load_tower, normalised
from training.data.scenes import make_scene
from training.data.views import square

CALIBRATION_SCENES = 48


@dataclass(frozen=True)
class Joined:
    """What came out: where it is, and what one should know of it."""

    folder: Path
    tower: str
    language_model: str
    projector: Projector
    tokens_per_picture: int  # at most, where they hang on its size
    trained_weights: int  # of the new projector
    weights: int


def join_models(
    tower: str,
    language_model: str,
    out: Path,
    projector: Projector = "mlp",
    tiles: Sequence[Grid] = (),
    seed: int = 1,
) -> Joined:
    """Join `tower` and `language_model`, folders or hub names, and write the result to `out`.

    With `tiles`, large pictures are cut by these grids, see `fusion.with_tiles`. The new projector starts so that
    pictures of generated scenes enter the language model centred and with unit variance; it says nothing yet. Weights
    are stored as the language model's were.
    Raises ModelError where a part cannot be had, is damaged, or does not fit.
    """
    torch.manual_seed(seed)
    seeing = load_tower(tower)
    speaking, tokenizer = load_language_model(language_model)
    stored = getattr(speaking.config, "dtype", None)
    model, processor = join(seeing.model, speaking, tokenizer, seeing.image_processor, projector, tiles)
    scenes = [pixels_of(make_scene(number).image) for number in range(CALIBRATION_SCENES)]
    views = torch.stack([square(pixels, output_side(processor.image_processor)) for pixels in scenes])
    calibrate_projector(model, normalised(views, processor.image_processor))
    _save(model, processor, out, stored)
    parts = model.model.multi_modal_projector
    return Joined(
        out,
        type(seeing.model).__name__,
        type(speaking).__name__,
        projector,
        most_tokens_per_picture(processor),
        sum(p.numel() for p in parts.parameters()),
        sum(p.numel() for p in model.parameters()),
    )


def tile_model(model: str, tiles: Sequence[Grid], out: Path, seed: int = 1) -> int:
    """Let the LLaVA `model`, a folder or hub name, cut large pictures by `tiles`, and write it to `out`.

    Returns the tokens of a picture at most. Raises ModelError where the model cannot be had or does not fit.
    """
    torch.manual_seed(seed)
    folder = find_model(model)
    require_unquantised(folder, "changed")
    loaded, processor = load_llava(folder)
    tiled, tiling = with_tiles(loaded, processor, tiles)
    stored = read_json(folder / "config.json").get("dtype")
    _save(tiled, tiling, out, getattr(torch, stored) if stored else None)
    return most_tokens_per_picture(tiling)


def _save(model: Llava, processor: Processor, out: Path, stored: torch.dtype | None) -> None:
    """Write to `out`, with weights in half precision where the parts were stored so."""
    save_llava(model, processor, out)
    if stored in (torch.bfloat16, torch.float16):
        convert_weights(out, "bfloat16")
