"""Join a vision tower, a projector and a language model into one assistant in a published layout."""

from collections.abc import Sequence

import torch
from transformers import (
    BaseImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SiglipVisionModel,
)

from assistant.chat import IMAGE_TOKEN
from assistant.models import ModelError
from assistant.projectors import SHUFFLE, Llava, Projector, calibrate_projector, new_projected_model, projector_of
from assistant.tiles import Grid, Processor, is_tiled, most_tokens_per_picture, tiled_image_processor
from assistant.tower_families import FAMILIES, layer_numbers
from assistant.tower_shapes import Family, new_image_processor, output_side

__all__ = [
    "LANGUAGE_MODELS",
    "Projector",
    "calibrate_projector",
    "join",
    "processor_for",
    "squeeze_pictures",
    "squeezing",
    "unused_tower_parameters",
    "with_tiles",
]

FEATURE_LAYER = -2  # LLaVA-1.5's choice: the last layer of a contrastive tower serves its pooled head, not its patches
JOINED: dict[type[PreTrainedModel], Family] = {
    CLIPVisionModel: "clip",
    SiglipVisionModel: "siglip",
    Dinov2Model: "dinov2",
}
# Each keeps its decoder bare in `model` beside `lm_head`, and vLLM knows it as a part of a larger model.
LANGUAGE_MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
TILED = (CLIPVisionModel, SiglipVisionModel)  # the towers that vLLM's own LLaVA-NeXT takes
# What a LLaVA and a LLaVA-NeXT say alike of their parts.
SAID_ALIKE = (
    "vision_config",
    "text_config",
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "tie_word_embeddings",
    "image_seq_length",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def join(
    tower: CLIPVisionModel | SiglipVisionModel | Dinov2Model,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor | None = None,
    projector: Projector = "mlp",
    tiles: Sequence[Grid] = (),
) -> tuple[Llava, Processor]:
    """One assistant from its parts, with a new projector (see `new_projected_model`); the parts' weights are copied.

    Attention spans picture and text tokens from the first layer on. The language model sees the patches alone: a class
    token is dropped, as in LLaVA-1.5. Of `image_processor`, the tower's own, side, mean and deviation are kept; where
    None, they are those of the tower's configuration and its family. With `tiles`, large pictures are cut by these
    grids, see `with_tiles`.

    Raises:
        ValueError: the tokenizer has no picture token or more words than the language model.
        ModelError: a tower or a language model of another family, pictures of another size than the tower can see,
            patches that do not divide by two for pixel-shuffle, or parts that cannot read tiles.
    """
    if not isinstance(language_model, LANGUAGE_MODELS):
        known = ", ".join(known.__name__ for known in LANGUAGE_MODELS)
        raise ModelError(f"a {type(language_model).__name__} is no language model we can join; these are: {known}")
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token is None or image_token == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN}; add it before joining")
    if len(tokenizer) > language_model.config.vocab_size:
        raise ValueError(f"{len(tokenizer)} words in the tokenizer, {language_model.config.vocab_size} in the model")
    processor = processor_for(tower, tokenizer, image_processor)
    said = {
        "vision_config": _config_in_llava(tower),
        "text_config": language_model.config,
        "image_token_index": image_token,
        "vision_feature_select_strategy": processor.vision_feature_select_strategy,
        "vision_feature_layer": FEATURE_LAYER,
        "tie_word_embeddings": language_model.config.tie_word_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    rows = output_side(processor.image_processor) // processor.patch_size
    model = new_projected_model(projector, rows, language_model.config.hidden_size, said)
    if projector == "pixel-shuffle":
        _make_tokens_span_patches(processor)
    _copy_parts(model, tower, language_model)
    return with_tiles(model, processor, tiles) if tiles else (model, processor)


def with_tiles(
    model: Llava, processor: Processor, grids: Sequence[Grid]
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """The same assistant in LLaVA-NeXT's layout: it sees a picture whole, and again in the tiles of one of `grids`.

    The weights are copied. The one new weight, the newline that stands behind each row of patches, starts as
    transformers starts it: at random, with variance 1 / D.
    Raises ModelError for a model of another layout, projector or tower than LLaVA-NeXT is served with, and for grids
    whose tokens leave the language model no room for words.
    """
    if is_tiled(processor) or not isinstance(model, LlavaForConditionalGeneration) or projector_of(model) != "mlp":
        raise ModelError(
            f"tiles are for a LLaVA with an mlp projector that has none yet, and this is a {type(model).__name__} "
            f"with a {projector_of(model)} one"
        )
    tower, side = model.model.vision_tower, output_side(processor.image_processor)
    if not isinstance(tower, TILED) or side != tower.config.image_size:
        raise ModelError(
            f"tiles are for a CLIP or SigLIP tower that sees squares of its own size, and this is a "
            f"{type(tower).__name__} for {tower.config.image_size} pixels, with a processor that makes {side}"
        )
    squeeze_pictures(model, processor)
    tiling = LlavaNextProcessor(
        image_processor=tiled_image_processor(processor.image_processor, grids),
        tokenizer=processor.tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        chat_template=processor.chat_template or processor.tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=FAMILIES[type(tower)].leading(tower),
    )
    most, positions = most_tokens_per_picture(tiling), model.config.text_config.max_position_embeddings
    if most >= positions:
        raise ModelError(
            f"tiles: a picture in the largest of these grids is {most:,} tokens, and the language model reads "
            f"{positions:,} with its words; take smaller grids"
        )
    said = {name: getattr(model.config, name) for name in SAID_ALIKE}
    pinpoints = tiling.image_processor.image_grid_pinpoints
    # The last is what llava-hf publishes beside it; whoever converts back to the authors' own form reads it.
    config = LlavaNextConfig(**said, image_grid_pinpoints=pinpoints, use_image_newline_parameter=True)
    tiled = LlavaNextForConditionalGeneration(config).to(model.dtype)
    tiled.load_state_dict(model.state_dict() | {"model.image_newline": tiled.model.image_newline.data}, strict=True)
    tiled.generation_config = model.generation_config
    return tiled, tiling


def _make_tokens_span_patches(processor: LlavaProcessor) -> None:
    """Let `processor` count tokens that span several patches. A class token was dropped before they were merged."""
    processor.patch_size *= SHUFFLE


def _config_in_llava(tower: PreTrainedModel) -> PretrainedConfig:
    """The tower's configuration, without SigLIP's pooling head: no patch depends on it."""
    config = tower.config.to_dict()
    if isinstance(tower, SiglipVisionModel):
        config["vision_use_head"] = False
    return type(tower.config)(**config)


def replace_tower(model: Llava, tower: PreTrainedModel) -> None:
    """Copy the weights of `tower` over those of the model's own, which has to be of the same kind and shape.

    Raises ModelError where it is not.
    """
    own = model.model.vision_tower
    head = {f"head.{name}" for name, _ in tower.head.named_parameters()} if hasattr(tower, "head") else set()
    weights = {name: value for name, value in tower.state_dict().items() if name not in head}
    shapes = {name: value.shape for name, value in own.state_dict().items()}
    if type(tower) is not type(own) or {name: value.shape for name, value in weights.items()} != shapes:
        raise ModelError(
            f"a {type(tower).__name__} of width {tower.config.hidden_size} cannot take the place of the model's "
            f"{type(own).__name__} of width {own.config.hidden_size}: the two differ in their weights"
        )
    own.load_state_dict(weights, strict=True)


def _copy_parts(model: Llava, tower: PreTrainedModel, language_model: PreTrainedModel) -> None:
    """Copy the weights of both parts into `model`."""
    replace_tower(model, tower)
    model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(language_model.lm_head.weight)
    model.tie_weights()


def processor_for(
    tower: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, image_processor: BaseImageProcessor | None = None
) -> LlavaProcessor:
    """Resizes pictures to one square, as training does, and widens each picture place to the tower's patches.

    `image_processor` is the tower's own, see `join`. Raises ModelError for a tower that LLaVA cannot look through.
    """
    if type(tower) not in JOINED:
        known = ", ".join(sorted(known.__name__ for known in JOINED))
        raise ModelError(f"a {type(tower).__name__} cannot be joined to a language model; these can: {known}")
    side = tower.config.image_size if image_processor is None else output_side(image_processor)
    if side != tower.config.image_size and not isinstance(tower, Dinov2Model):
        raise ModelError(
            f"the image processor makes {side} pixels and the tower sees {tower.config.image_size} in a LLaVA: "
            f"transformers interpolates the positions of DINOv2 alone there; give a processor of its size"
        )
    square = squeezing(tower, side, image_processor)
    leading = FAMILIES[type(tower)].leading(tower)
    return LlavaProcessor(
        image_processor=square,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default" if leading else "full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=leading,
    )


def squeezing(tower: PreTrainedModel, side: int, own: BaseImageProcessor | None) -> BaseImageProcessor:
    """Resizes all of a picture to `side` x `side` pixels, with the mean and deviation of `own`."""
    square = new_image_processor(JOINED[type(tower)], side)
    square.crop_size = {"height": side, "width": side}  # crops nothing: LLaVA's processor counts patches by it
    if own is not None:
        square.image_mean, square.image_std = own.image_mean, own.image_std
    return square


def squeeze_pictures(model: Llava, processor: Processor) -> None:
    """Let `processor` squeeze pictures to the square that it would crop out of them, as all training here does.

    What is exported then sees pictures as it was taught to. One that cuts tiles crops nothing: it stays as it is.
    """
    own, tower = processor.image_processor, model.model.vision_tower
    if is_tiled(processor):
        return
    if type(tower) in JOINED and (getattr(own, "do_center_crop", False) or "shortest_edge" in dict(own.size)):
        processor.image_processor = squeezing(tower, output_side(own), own)


def unused_tower_parameters(model: Llava) -> set[str]:
    """Names of tower parameters that no answer depends on: behind the feature layer, and DINOv2's mask token."""
    tower = model.model.vision_tower
    numbers = layer_numbers(tower)
    chosen, count = model.config.vision_feature_layer, tower.config.num_hidden_layers + 1
    last_used = max(layer % count for layer in ([chosen] if isinstance(chosen, int) else chosen))
    return {
        f"model.vision_tower.{name}"
        for name, number in numbers.items()
        if number > last_used or name == "embeddings.mask_token"
    }
