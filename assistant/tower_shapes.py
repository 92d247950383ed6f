"""Shapes of new towers and of their text halves, and the models with random weights that they stand for."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import processors
from torch import nn
from transformers import (
    BaseImageProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from assistant.models import ModelError
from assistant.position_embeddings import AMPLITUDE, AMPLITUDE_OF_SIGLIP, start_positions

BILINEAR = 2  # PIL's number
CLIP_END_TOKEN = "<|endoftext|>"  # OpenAI's name for it
LEGACY_END_ID = 2  # see clip_tokenizer

Family = Literal["clip", "siglip", "dinov2", "vit", "resnet"]

RESNETS: dict[int, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    50: ("bottleneck", (3, 4, 6, 3), (256, 512, 1024, 2048)),
}


@dataclass(frozen=True)
class ViTShape:
    """A new vision transformer in the layout of `family`; sizes of patch and picture are pixels.

    Only DINOv2 has stochastic depth (`drop_path`, alike in every layer) and LayerScale (`layer_scale`, its start).
    Raises ValueError for numbers that do not fit each other or the family.
    """

    family: Literal["clip", "siglip", "dinov2", "vit"]
    width: int
    layers: int
    heads: int
    patch: int
    image_side: int
    drop_path: float = 0.0
    layer_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into {self.heads} heads")
        if self.image_side % self.patch:
            raise ValueError(f"{self.image_side} pixels do not divide into patches of {self.patch}")
        if self.family != "dinov2" and (self.drop_path != 0 or self.layer_scale != 1):
            raise ValueError(
                f"transformers has no drop_path and no layer_scale in {self.family} towers, only in dinov2: "
                "leave them out or take the family dinov2"
            )


@dataclass(frozen=True)
class ResNetShape:
    """A new ResNet of He et al. (2015), table 1; `image_side` in pixels."""

    depth: Literal[18, 50]
    image_side: int


@dataclass(frozen=True)
class TextShape:
    """A new text half of `length` tokens; `feed_forward` is the width between the two maps of a layer's MLP."""

    width: int
    layers: int
    heads: int
    length: int
    feed_forward: int


def new_model(shape: ViTShape | ResNetShape) -> PreTrainedModel:
    """transformers' bare vision model of that shape, its weights drawn from torch's default generator.

    The patches of a ViT stand at sine positions, see `start_positions`.
    """
    if isinstance(shape, ResNetShape):
        kind, depths, widths = RESNETS[shape.depth]
        return ResNetModel(ResNetConfig(layer_type=kind, depths=list(depths), hidden_sizes=list(widths)))
    model = _NEW_MODEL[shape.family](shape)
    _place_patches(model.get_submodule("embeddings"), shape)
    return model


def _place_patches(embeddings: nn.Module, shape: ViTShape) -> None:
    amplitude = AMPLITUDE_OF_SIGLIP if shape.family == "siglip" else AMPLITUDE
    start_positions(embeddings, shape.image_side // shape.patch, amplitude)


def _sizes(shape: ViTShape) -> dict[str, Any]:
    """What the configs of all families call alike."""
    return {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "patch_size": shape.patch,
        "image_size": shape.image_side,
    }


def _clip_config(shape: ViTShape) -> CLIPVisionConfig:
    # OpenAI's quick_gelu approximates gelu and is slower than it today; open_clip's own models have gelu too.
    return CLIPVisionConfig(**_sizes(shape), intermediate_size=4 * shape.width, hidden_act="gelu")


def _siglip_config(shape: ViTShape) -> SiglipVisionConfig:
    return SiglipVisionConfig(**_sizes(shape), intermediate_size=4 * shape.width)


def _dinov2_config(shape: ViTShape) -> Dinov2Config:
    return Dinov2Config(**_sizes(shape), drop_path_rate=shape.drop_path, layerscale_value=shape.layer_scale)


def _vit_config(shape: ViTShape) -> ViTConfig:
    return ViTConfig(**_sizes(shape), intermediate_size=4 * shape.width)


_NEW_MODEL: dict[str, Callable[[ViTShape], PreTrainedModel]] = {
    "clip": lambda shape: CLIPVisionModel(_clip_config(shape)),
    "siglip": lambda shape: SiglipVisionModel(_siglip_config(shape)),
    "dinov2": lambda shape: Dinov2Model(_dinov2_config(shape)),
    "vit": lambda shape: ViTModel(_vit_config(shape), add_pooling_layer=False),
}


def new_image_processor(family: Family, side: int) -> BaseImageProcessor:
    """Resizes to `side` x `side` pixels (bilinear, antialiased, nothing cropped) with the family's published mean.

    A ResNet's published processor always crops small sizes, so that it gets ViT's, with its own mean and deviation.
    `crop_size` crops nothing here: LLaVA's processor reads from it how many patches a picture has.
    """
    size = {"height": side, "width": side}
    imagenet = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    square: dict[str, Any] = {"size": size, "resample": BILINEAR}
    uncropped = square | {"crop_size": size, "do_center_crop": False}
    match family:
        case "clip":
            return CLIPImageProcessor(**uncropped)
        case "siglip":
            return SiglipImageProcessor(**square)
        case "dinov2":
            return BitImageProcessor(**uncropped, **imagenet)
        case "vit":
            return ViTImageProcessor(**square, do_convert_rgb=True)
        case "resnet":
            return ViTImageProcessor(**square, **imagenet, do_convert_rgb=True)


def output_side(image_processor: BaseImageProcessor) -> int:
    """Pixels of the square that `image_processor` makes. Raises ModelError where it makes none of one size."""
    cropped = getattr(image_processor, "do_center_crop", False) and image_processor.crop_size
    size = dict(image_processor.crop_size if cropped else image_processor.size)
    sides = {size[key] for key in ("height", "width", "shortest_edge") if size.get(key)}
    if len(sides) != 1:
        raise ModelError(f"the image processor makes no square of one size: its size is {size}")
    return int(sides.pop())


def new_pair(shape: ViTShape, text: TextShape, tokenizer: PreTrainedTokenizerBase) -> SiglipModel | CLIPModel:
    """A SigLIP or CLIP, as `shape.family` says, with random weights and a text half for `tokenizer`.

    Its patches stand at sine positions, see `start_positions`.
    SigLIP's text half reads a text in both directions and pools at the last place; it gives as many channels as the
    tower has. CLIP's looks back only and pools at the end token; both halves are projected to the text's width, as in
    OpenAI's models. Raises ValueError for another family, and for CLIP with a tokenizer that `clip_tokenizer` has to
    prepare first.
    """
    words = {
        "vocab_size": len(tokenizer),
        "hidden_size": text.width,
        "intermediate_size": text.feed_forward,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if shape.family == "siglip":
        siglip_text = SiglipTextConfig(**words, projection_size=shape.width)
        pair: SiglipModel | CLIPModel = SiglipModel(
            SiglipConfig(text_config=siglip_text.to_dict(), vision_config=_siglip_config(shape).to_dict())
        )
    elif shape.family == "clip":
        _check_end_token(tokenizer)
        clip_text = CLIPTextConfig(**words, hidden_act="gelu")
        pair = CLIPModel(
            CLIPConfig(
                text_config=clip_text.to_dict(),
                vision_config=_clip_config(shape).to_dict(),
                projection_dim=text.width,
            )
        )
    else:
        raise ValueError(f"a tower with a text half is a clip or a siglip, not a {shape.family}")
    _place_patches(pair.get_submodule("vision_model.embeddings"), shape)
    return pair


def clip_tokenizer(tokenizer: PreTrainedTokenizerFast, length: int) -> PreTrainedTokenizerFast:
    """A copy of `tokenizer` for CLIP's text half of `length` tokens: every text ends in a new token of its own.

    CLIP pools where the end token stands. Transformers takes an end token with the id 2 for a sign of its first CLIP
    configs, whose id was wrong, and then pools at the highest id in the text: with a tokenizer whose end token really
    is 2 (ours) that is some word or other. The new token has the highest id of all, which is right by either rule.
    """
    prepared = copy.deepcopy(tokenizer)
    prepared.add_special_tokens({"eos_token": CLIP_END_TOKEN})
    prepared.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {CLIP_END_TOKEN}", special_tokens=[(CLIP_END_TOKEN, prepared.eos_token_id)]
    )
    prepared.model_max_length = length
    prepared.padding_side = "right"
    return prepared


def _check_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError unless CLIP's text half finds the end of every text."""
    ids = tokenizer("a")["input_ids"]
    if tokenizer.eos_token_id in (None, LEGACY_END_ID) or ids[-1] != tokenizer.eos_token_id:
        raise ValueError(
            f"CLIP's text half looks for an end token, other than number {LEGACY_END_ID}, behind every text, and this "
            "tokenizer puts none there: prepare it with clip_tokenizer"
        )
