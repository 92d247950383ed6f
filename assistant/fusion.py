"""Join a vision tower, a projector and a language model into one LLaVA."""

import torch
from transformers import (
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
    SiglipVisionModel,
)

from assistant.chat import IMAGE_TOKEN

FEATURE_LAYER = -2  # LLaVA-1.5's choice: the last layer of a contrastive tower serves its pooled head, not its patches


def join(
    tower: SiglipVisionModel, language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """One LLaVA from its parts, with a new two-layer MLP projector; the parts' weights are copied.

    Attention spans picture and text tokens from the first layer on. Raises ValueError when the tokenizer has no picture
    token or more words than the language model.
    """
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token is None or image_token == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {IMAGE_TOKEN}; add it before joining")
    if len(tokenizer) > language_model.config.vocab_size:
        raise ValueError(f"{len(tokenizer)} words in the tokenizer, {language_model.config.vocab_size} in the model")
    vision_config = type(tower.config)(**(tower.config.to_dict() | {"vision_use_head": False}))
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",
        vision_feature_layer=FEATURE_LAYER,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    head = {f"head.{name}" for name, _ in tower.head.named_parameters()} if hasattr(tower, "head") else set()
    weights = {name: value for name, value in tower.state_dict().items() if name not in head}
    model.model.vision_tower.load_state_dict(weights, strict=True)
    model.model.language_model.load_state_dict(language_model.model.state_dict(), strict=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(language_model.lm_head.weight)
    model.tie_weights()
    return model, processor_for(vision_config.image_size, vision_config.patch_size, tokenizer)


def calibrate_projector(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> None:
    """Start a new projector so that picture tokens enter the language model centred and with unit variance.

    A tower's features share a large mean and a few loud channels. From LLaVA's own start (normal, 0.02) a small model
    of ours drove picture tokens to 700 times the size of words, where neither its layers nor its gradients move them,
    and looked at no picture at all. `pixels` (B, C, H, W) are some pictures as the processor gives them.
    """
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        tower = model.model.vision_tower(pixels, output_hidden_states=True)
        features = tower.hidden_states[model.config.vision_feature_layer].flatten(0, 1)
        _standardise(projector.linear_1, features)
        _standardise(projector.linear_2, projector.act(projector.linear_1(features)))


def _standardise(layer: torch.nn.Linear, inputs: torch.Tensor) -> None:
    """Draw `layer` anew so that its outputs on `inputs` (S, D) have zero mean and unit variance."""
    mean, deviation = inputs.mean(0), inputs.std(0)
    # A channel that hardly varies is not blown up to the size of the others: it would be noise.
    deviation = deviation.clamp_min(0.1 * float(deviation.median()))
    layer.weight.normal_(std=inputs.shape[1] ** -0.5).div_(deviation)
    layer.bias.copy_(-layer.weight @ mean)


def processor_for(side: int, patch: int, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Resizes pictures to `side` x `side` pixels and widens each picture place to its patches."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": side, "width": side}, resample=2),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
    )


def unused_tower_parameters(model: LlavaForConditionalGeneration) -> set[str]:
    """Names of tower parameters behind the feature layer: the answer does not depend on them."""
    layers = model.config.vision_config.num_hidden_layers
    first_unused = layers + 1 + model.config.vision_feature_layer
    unused = tuple(f"encoder.layers.{number}." for number in range(first_unused, layers))
    prefix = "model.vision_tower."
    names = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    return {n for n in names if n.removeprefix(prefix).startswith((*unused, "post_layernorm.", "head."))}
