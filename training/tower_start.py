"""Begin a stage that trains a tower: the new tower, with a text half where it has one, and the objective on it."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from assistant.towers import (
    ResNetShape,
    TextShape,
    ViTShape,
    clip_tokenizer,
    new_image_processor,
    new_pair,
    new_tower,
)
from training.config import RecipeError, ResidualShape, TowerStage, check_settings, objective_module
from training.objective import Objective, Start


def new_start(stage: TowerStage, side: int, tokenizer_of: Callable[[str | None], PreTrainedTokenizerFast]) -> Start:
    """The new tower of `stage` for views of `side` pixels, and its text half where it has one.

    `tokenizer_of` finds what the stage calls its tokenizer; Joey's for None. Raises RecipeError without a backbone.
    """
    shape = stage.backbone
    if shape is None:
        raise RecipeError(f"stage {stage.name} has neither a backbone nor start_from")
    if isinstance(shape, ResidualShape):
        return Start(side, new_tower(ResNetShape(shape.depth, shape.image_side)))
    vit = ViTShape(**shape.model_dump())
    if stage.text is None:
        return Start(side, new_tower(vit))
    tokenizer = tokenizer_of(stage.tokenizer)
    if vit.family == "clip":
        tokenizer = clip_tokenizer(tokenizer, stage.text.length)
    text = TextShape(vit.width, stage.text.layers, vit.heads, stage.text.length, 2 * vit.width)
    image_processor = new_image_processor(vit.family, vit.image_side)
    return Start(side, None, new_pair(vit, text, tokenizer), image_processor, tokenizer)


def objective_on(stage: TowerStage, start: Start) -> Objective:
    """The objective of `stage` on the tower of `start`. Raises RecipeError where the two do not fit."""
    for model in (start.model, start.tower.model if start.tower else None):
        if model is not None and stage.attention is not None:
            model.set_attn_implementation(stage.attention)
    try:
        return objective_module(stage.objective).build(check_settings(stage.objective, stage.settings), start)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: {error}") from error
