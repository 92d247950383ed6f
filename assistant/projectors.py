"""Projectors between a tower and a language model, each in a published layout: linear, MLP, pixel-shuffle."""

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from assistant.models import ModelError

Projector = Literal["linear", "mlp", "pixel-shuffle"]
PROJECTORS: tuple[Projector, ...] = get_args(Projector)
Llava: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | AyaVisionForConditionalGeneration
SHUFFLE = 2  # pixel-shuffle makes one token of so many patches in each direction


def new_projected_model(kind: Projector, rows: int, width: int, said: dict[str, Any]) -> Llava:
    """A model with random weights and a projector of that kind, in the layout that is published for it.

    - mlp: two layers with a GELU (LLaVA-1.5, Liu et al. 2023), in LLaVA's layout.
    - linear: one matrix (LLaVA, Liu et al. 2023), in LLaVA's layout with no activation; the second layer is identity.
    - pixel-shuffle: 2 x 2 patches become one token, then LayerNorm and a SwiGLU layer, in Aya Vision's layout (Dash et
      al. 2025). Of the published layouts with pixel-shuffle it alone takes CLIP, SigLIP and DINOv2: InternVL's and
      Idefics3's bring towers of their own, and Cohere2Vision's and LFM2-VL's take SigLIP alone.

    `rows` of patches on a side, `width` of the language model, and `said` what both configurations share.
    Raises ModelError where the patches do not divide by two for pixel-shuffle.
    """
    if kind == "pixel-shuffle":
        if rows % SHUFFLE:
            raise ModelError(
                f"pixel-shuffle makes one token of {SHUFFLE} x {SHUFFLE} patches, and this tower sees {rows} x {rows}; "
                "take another projector, or a tower with an even number on a side"
            )
        shuffled = AyaVisionConfig(**said, downsample_factor=SHUFFLE, alignment_intermediate_size=2 * width)
        return AyaVisionForConditionalGeneration(shuffled)
    act = "linear" if kind == "linear" else "gelu"
    model = LlavaForConditionalGeneration(LlavaConfig(**said, image_seq_length=rows**2, projector_hidden_act=act))
    if kind == "linear":
        second = model.model.multi_modal_projector.linear_2
        with torch.no_grad():
            second.weight.copy_(torch.eye(width))
            second.bias.zero_()
    return model


def projector_of(model: Llava) -> Projector:
    """Which kind of projector `model` has."""
    if isinstance(model, AyaVisionForConditionalGeneration):
        return "pixel-shuffle"
    return "linear" if model.config.projector_hidden_act == "linear" else "mlp"


def unused_projector_parameters(model: Llava) -> set[str]:
    """Names of projector parameters that say nothing of their own: the second layer behind a linear one."""
    if projector_of(model) != "linear":
        return set()
    return {f"model.multi_modal_projector.linear_2.{kind}" for kind in ("weight", "bias")}


def picture_features(model: Llava, pixels: Tensor) -> Tensor:
    """What the projector reads, (B, N, D), of normalised pixels (B, 3, H, W): patches of the configured layer(s).

    A class token is dropped where the configuration says so. Equal to the first half of transformers'
    `get_image_features`.
    """
    hidden = model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    chosen = model.config.vision_feature_layer
    layers = [hidden[layer] for layer in ([chosen] if isinstance(chosen, int) else chosen)]
    if model.config.vision_feature_select_strategy == "default":
        layers = [layer[:, 1:] for layer in layers]
    return torch.cat(layers, dim=-1)


def picture_tokens(model: Llava, features: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(B, n, W) of `picture_features` (B, N, D): what stands in the places of the picture token.

    A model that reads tiles needs the `sizes` (pictures, 2) of the pictures whose views the B are, see `tiles.cut`; it
    gives (S, W), picture behind picture, with the model's newline behind each row of patches.
    """
    if isinstance(model, LlavaNextForConditionalGeneration) != (sizes is not None):
        raise ValueError(f"sizes of pictures are for a model that reads tiles, and this is a {type(model).__name__}")
    seen = model.model.multi_modal_projector(features)
    if sizes is None:
        return seen.flatten(1, -2)
    config = model.config
    counts = [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size in sizes.tolist()
    ]
    packed, _ = model.model.pack_image_features(
        torch.split(seen, counts),
        sizes,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=model.model.image_newline,
    )
    return torch.cat(packed)


def calibrate_projector(model: Llava, pixels: Tensor) -> None:
    """Start a new projector so that picture tokens enter the language model centred and with unit variance.

    A tower's features share a large mean and a few loud channels. From LLaVA's own start (normal, 0.02) a small model
    of ours drove picture tokens to 700 times the size of words, where neither its layers nor its gradients move them,
    and looked at no picture at all. `pixels` (B, C, H, W) are some pictures as the processor gives them.
    """
    projector, kind = model.model.multi_modal_projector, projector_of(model)
    with torch.no_grad():
        features = picture_features(model, pixels).to(projector.linear_1.weight.dtype)  # a still tower may be bfloat16
        if kind == "pixel-shuffle":
            features = projector.layernorm(projector.pixel_shuffle(features).flatten(1, 2))
        features = features.flatten(0, 1)
        _standardise(projector.linear_1, features)
        if kind == "linear":
            return
        between = projector.linear_1(features)
        if kind == "pixel-shuffle":
            half, gate = between.chunk(2, dim=-1)
            between = projector.act(gate) * half
        else:
            between = projector.act(between)
        _standardise(projector.linear_2, between)


def _standardise(layer: nn.Linear, inputs: Tensor) -> None:
    """Draw `layer` anew so that its outputs on `inputs` (S, D) have zero mean and unit variance."""
    mean, deviation = inputs.mean(0), inputs.std(0)
    # A channel that hardly varies is not blown up to the size of the others: it would be noise.
    deviation = deviation.clamp_min(0.1 * float(deviation.median()))
    layer.weight.normal_(std=inputs.shape[1] ** -0.5).div_(deviation)
    layer.bias.copy_(-layer.weight @ mean)
