"""Join a vision tower, a projector and a language model into one LLaVA."""

import torch
from transformers import (
    BaseImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from assistant.chat import IMAGE_TOKEN
from assistant.models import ModelError
from assistant.tower_families import FAMILIES, layer_numbers
from assistant.tower_shapes import Family, new_image_processor, output_side

FEATURE_LAYER = -2  # LLaVA-1.5's choice: the last layer of a contrastive tower serves its pooled head, not its patches
JOINED: dict[type[PreTrainedModel], Family] = {
    CLIPVisionModel: "clip",
    SiglipVisionModel: "siglip",
    Dinov2Model: "dinov2",
}


def join(
    tower: CLIPVisionModel | SiglipVisionModel | Dinov2Model,
    language_model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BaseImageProcessor | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """One LLaVA from its parts, with a new two-layer MLP projector; the parts' weights are copied.

    Attention spans picture and text tokens from the first layer on. The language model sees the patches alone: a class
    token is dropped, as in LLaVA-1.5. Of `image_processor`, the tower's own, side, mean and deviation are kept; where
    None, they are those of the tower's configuration and its family.

    Raises:
        ValueError: the tokenizer has no picture token or more words than the language model.
        ModelError: a tower of another family, or pictures of another size than it can see.
    """
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token is None or image_token == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN}; add it before joining")
    if len(tokenizer) > language_model.config.vocab_size:
        raise ValueError(f"{len(tokenizer)} words in the tokenizer, {language_model.config.vocab_size} in the model")
    processor = processor_for(tower, tokenizer, image_processor)
    config = LlavaConfig(
        vision_config=_config_in_llava(tower),
        text_config=language_model.config,
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        vision_feature_layer=FEATURE_LAYER,
        image_seq_length=(output_side(processor.image_processor) // processor.patch_size) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    _copy_parts(model, tower, language_model)
    return model, processor


def _config_in_llava(tower: PreTrainedModel) -> PretrainedConfig:
    """The tower's configuration, without SigLIP's pooling head: no patch depends on it."""
    config = tower.config.to_dict()
    if isinstance(tower, SiglipVisionModel):
        config["vision_use_head"] = False
    return type(tower.config)(**config)


def _copy_parts(model: LlavaForConditionalGeneration, tower: PreTrainedModel, language_model: LlamaForCausalLM) -> None:
    """Copy the weights of both parts into `model`."""
    head = {f"head.{name}" for name, _ in tower.head.named_parameters()} if hasattr(tower, "head") else set()
    weights = {name: value for name, value in tower.state_dict().items() if name not in head}
    model.model.vision_tower.load_state_dict(weights, strict=True)
    model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(language_model.lm_head.weight)
    model.tie_weights()


def calibrate_projector(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Start a new projector so that picture tokens enter the language model centred and with unit variance.

    A tower's features share a large mean and a few loud channels. From LLaVA's own start (normal, 0.02) a small model
    of ours drove picture tokens to 700 times the size of words, where neither its layers nor its gradients move them,
    and looked at no picture at all. `pixels` (B, C, H, W) are some pictures as the processor gives them.
    """
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_hidden_states=True)
        features = tower.hidden_states[model.config.vision_feature_layer]
        if model.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = features.flatten(0, 1)
        _standardise(projector.linear_1, features)
        _standardise(projector.linear_2, projector.act(projector.linear_1(features)))


def _standardise(layer: torch.nn.Linear, inputs: torch.Tensor) -> None:
    """Draw `layer` anew so that its outputs on `inputs` (S, D) have zero mean and unit variance."""
    mean, deviation = inputs.mean(0), inputs.std(0)
    # A channel that hardly varies is not blown up to the size of the others: it would be noise.
    deviation = deviation.clamp_min(0.1 * float(deviation.median()))
    layer.weight.normal_(std=inputs.shape[1] ** -0.5).div_(deviation)
    layer.bias.copy_(-layer.weight @ mean)


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
    square = new_image_processor(JOINED[type(tower)], side)
    if image_processor is not None:
        square.image_mean, square.image_std = image_processor.image_mean, image_processor.image_std
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


def unused_tower_parameters(model: LlavaForConditionalGeneration) -> set[str]:
    """Names of tower parameters that no answer depends on: behind the feature layer, and DINOv2's mask token."""
    tower = model.model.vision_tower
    numbers = layer_numbers(tower)
    last_used = (model.config.vision_feature_layer + tower.config.num_hidden_layers + 1) % (
        tower.config.num_hidden_layers + 1
    )
    return {
        f"model.vision_tower.{name}"
        for name, number in numbers.items()
        if number > last_used or name == "embeddings.mask_token"
    }
