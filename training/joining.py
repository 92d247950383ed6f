"""Join a tower and a language model that never met, and leave a model that can be aligned."""

from dataclasses import dataclass
from pathlib import Path

import torch

from assistant.checkpoint import convert_weights, save_llava
from assistant.fusion import calibrate_projector, join
from assistant.language_models import load_language_model
from assistant.pixels import pixels_of
from assistant.projectors import Projector
from assistant.tower_shapes import output_side
from assistant.towers import load_tower, normalised
from training.data.scenes import make_scene
from training.data.views import square
from training.objectives.instruct import tokens_per_picture

CALIBRATION_SCENES = 48


@dataclass(frozen=True)
class Joined:
    """What came out: where it is, and what one should know of it."""

    folder: Path
    tower: str
    language_model: str
    projector: Projector
    tokens_per_picture: int
    trained_weights: int  # of the new projector
    weights: int


def join_models(tower: str, language_model: str, out: Path, projector: Projector = "mlp", seed: int = 1) -> Joined:
    """Join `tower` and `language_model`, folders or hub names, and write the result to `out`.

    The new projector starts so that pictures of generated scenes enter the language model centred and with unit
    variance; it says nothing yet. Weights are stored as the language model's were.
    Raises ModelError where a part cannot be had, is damaged, or does not fit.
    """
    torch.manual_seed(seed)
    seeing = load_tower(tower)
    speaking, tokenizer = load_language_model(language_model)
    stored = getattr(speaking.config, "dtype", None)
    model, processor = join(seeing.model, speaking, tokenizer, seeing.image_processor, projector)
    scenes = [pixels_of(make_scene(number).image) for number in range(CALIBRATION_SCENES)]
    views = torch.stack([square(pixels, output_side(processor.image_processor)) for pixels in scenes])
    calibrate_projector(model, normalised(views, processor.image_processor))
    save_llava(model, processor, out)
    if stored in (torch.bfloat16, torch.float16):
        convert_weights(out, "bfloat16")
    parts = model.model.multi_modal_projector
    return Joined(
        out,
        type(seeing.model).__name__,
        type(speaking).__name__,
        projector,
        tokens_per_picture(processor),
        sum(p.numel() for p in parts.parameters()),
        sum(p.numel() for p in model.parameters()),
    )
