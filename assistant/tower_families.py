"""What differs between families of vision towers: where their layers are, how they embed, normalise and pool."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    ResNetModel,
    SiglipVisionModel,
    ViTModel,
)

from assistant.models import ModelError

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class TowerOutput:
    """What a tower makes of B pictures: patches (B, N, D) after its last normalisation, and pooled (B, D)."""

    patches: Tensor
    pooled: Tensor


class Family(ABC, Generic[Model]):
    """How to reach into the models of one family; it keeps nothing itself."""

    first_parts: tuple[str, ...] = ("embeddings",)  # the modules that stand before the first layer

    @abstractmethod
    def layers(self, model: Model) -> Sequence[nn.Module]:
        """The layers (stages of a ResNet), first to last."""

    def width(self, model: Model) -> int:
        """D, channels of what comes out."""
        return int(model.config.hidden_size)

    def patch_size(self, model: Model) -> int:
        """Pixels from one patch to the next."""
        return int(model.config.patch_size)

    def leading(self, model: Model) -> int:
        """How many tokens stand before the patches: the class token, registers."""
        return 0


class TransformerFamily(Family[Model]):
    """A vision transformer: patches become tokens, which can be hidden or left out."""

    def leading(self, model: Model) -> int:
        return 1

    @abstractmethod
    def embed(self, model: Model, pixels: Tensor) -> Tensor:
        """Patches (B, N, D) of pixels (B, 3, H, W), without positions."""

    @abstractmethod
    def place(self, model: Model, patches: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B, leading + N, D): patches (B, N, D) of pictures of that size with positions, leading tokens added.

        Position embeddings are interpolated by the model's own method.
        """

    @abstractmethod
    def enter(self, model: Model, tokens: Tensor) -> Tensor:
        """What happens to tokens (B, T, D) between the positions and the first layer."""

    @abstractmethod
    def leave(self, model: Model, tokens: Tensor) -> TowerOutput:
        """Normalise and pool what the last layer gave (B, T, D)."""


class Clip(TransformerFamily[CLIPVisionModel]):
    """CLIP: pooled is the class token; transformers leaves its patches without the last normalisation, we do not."""

    first_parts = ("embeddings", "pre_layrnorm")

    def layers(self, model: CLIPVisionModel) -> Sequence[nn.Module]:
        return model.encoder.layers

    def embed(self, model: CLIPVisionModel, pixels: Tensor) -> Tensor:
        return _convolved(model.embeddings.patch_embedding, pixels)

    def place(self, model: CLIPVisionModel, patches: Tensor, height: int, width: int) -> Tensor:
        return _with_class_token(model.embeddings, model.embeddings.class_embedding, patches, height, width)

    def enter(self, model: CLIPVisionModel, tokens: Tensor) -> Tensor:
        return model.pre_layrnorm(tokens)

    def leave(self, model: CLIPVisionModel, tokens: Tensor) -> TowerOutput:
        tokens = model.post_layernorm(tokens)
        return TowerOutput(tokens[:, 1:], tokens[:, 0])


class Siglip(TransformerFamily[SiglipVisionModel]):
    """SigLIP: no class token; pooled is its attention head's, and the mean of the patches where it has none."""

    def layers(self, model: SiglipVisionModel) -> Sequence[nn.Module]:
        return model.encoder.layers

    def leading(self, model: SiglipVisionModel) -> int:
        return 0

    def embed(self, model: SiglipVisionModel, pixels: Tensor) -> Tensor:
        return _convolved(model.embeddings.patch_embedding, pixels)

    def place(self, model: SiglipVisionModel, patches: Tensor, height: int, width: int) -> Tensor:
        return patches + model.embeddings.interpolate_pos_encoding(patches, height, width)

    def enter(self, model: SiglipVisionModel, tokens: Tensor) -> Tensor:
        return tokens

    def leave(self, model: SiglipVisionModel, tokens: Tensor) -> TowerOutput:
        tokens = model.post_layernorm(tokens)
        return TowerOutput(tokens, model.head(tokens) if model.use_head else tokens.mean(1))


class Dinov2(TransformerFamily[Dinov2Model]):
    """DINOv2: pooled is the class token."""

    def layers(self, model: Dinov2Model) -> Sequence[nn.Module]:
        return model.encoder.layer

    def embed(self, model: Dinov2Model, pixels: Tensor) -> Tensor:
        return model.embeddings.patch_embeddings(pixels)

    def place(self, model: Dinov2Model, patches: Tensor, height: int, width: int) -> Tensor:
        return _with_class_token(model.embeddings, model.embeddings.cls_token, patches, height, width)

    def enter(self, model: Dinov2Model, tokens: Tensor) -> Tensor:
        return model.embeddings.dropout(tokens)

    def leave(self, model: Dinov2Model, tokens: Tensor) -> TowerOutput:
        tokens = model.layernorm(tokens)
        return TowerOutput(tokens[:, self.leading(model) :], tokens[:, 0])


class Dinov2WithRegisters(Dinov2):
    """DINOv2 with register tokens, which stand between the class token and the patches and have no position."""

    def leading(self, model: Dinov2WithRegistersModel) -> int:
        return 1 + int(model.config.num_register_tokens)

    def place(self, model: Dinov2WithRegistersModel, patches: Tensor, height: int, width: int) -> Tensor:
        tokens = super().place(model, patches, height, width)
        registers = model.embeddings.register_tokens.expand(len(tokens), -1, -1)
        return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)


class ViT(TransformerFamily[ViTModel]):
    """The plain ViT: pooled is the class token, without the pooling layer that transformers may put behind it."""

    def layers(self, model: ViTModel) -> Sequence[nn.Module]:
        return model.layers

    def embed(self, model: ViTModel, pixels: Tensor) -> Tensor:
        embeddings = model.embeddings.patch_embeddings
        return embeddings(pixels.to(embeddings.projection.weight.dtype))

    def place(self, model: ViTModel, patches: Tensor, height: int, width: int) -> Tensor:
        return _with_class_token(model.embeddings, model.embeddings.cls_token, patches, height, width)

    def enter(self, model: ViTModel, tokens: Tensor) -> Tensor:
        return model.embeddings.dropout(tokens)

    def leave(self, model: ViTModel, tokens: Tensor) -> TowerOutput:
        tokens = model.layernorm(tokens)
        return TowerOutput(tokens[:, 1:], tokens[:, 0])


class ResNet(Family[ResNetModel]):
    """ResNet: patches are the places of its last feature map, pooled their mean."""

    first_parts = ("embedder",)

    def layers(self, model: ResNetModel) -> Sequence[nn.Module]:
        return model.encoder.stages

    def width(self, model: ResNetModel) -> int:
        return int(model.config.hidden_sizes[-1])

    def patch_size(self, model: ResNetModel) -> int:
        # The stem halves twice, each further stage once, the first only where its config says so.
        halvings = 2 + len(model.config.hidden_sizes) - 1 + bool(model.config.downsample_in_first_stage)
        return 2**halvings

    def run(self, model: ResNetModel, pixels: Tensor) -> TowerOutput:
        """Patches and pooled of pixels (B, 3, H, W)."""
        features = model.embedder(pixels)
        for stage in model.encoder.stages:
            features = stage(features)
        return TowerOutput(features.flatten(2).transpose(1, 2), model.pooler(features).flatten(1))


FAMILIES: dict[type[PreTrainedModel], TransformerFamily[Any] | ResNet] = {
    CLIPVisionModel: Clip(),
    SiglipVisionModel: Siglip(),
    Dinov2Model: Dinov2(),
    Dinov2WithRegistersModel: Dinov2WithRegisters(),
    ViTModel: ViT(),
    ResNetModel: ResNet(),
}


def layer_numbers(model: PreTrainedModel) -> dict[str, int]:
    """Where each parameter of `model` stands: 0 before the layers, i + 1 in layer i, one more behind the last.

    Raises ModelError for a model of no family here.
    """
    family = family_of(model)
    places: dict[nn.Parameter, int] = {}
    for part in family.first_parts:
        places |= dict.fromkeys(model.get_submodule(part).parameters(), 0)
    layers = family.layers(model)
    for number, layer in enumerate(layers, start=1):
        places |= dict.fromkeys(layer.parameters(), number)
    return {name: places.get(weight, len(layers) + 1) for name, weight in model.named_parameters()}


def family_of(model: PreTrainedModel) -> TransformerFamily[Any] | ResNet:
    """The family of `model`. Raises ModelError when it is of none."""
    if type(model) not in FAMILIES:
        known = ", ".join(sorted(known.__name__ for known in FAMILIES))
        raise ModelError(f"a {type(model).__name__} is no vision tower that we know; they are: {known}")
    return FAMILIES[type(model)]


def _convolved(convolution: nn.Conv2d, pixels: Tensor) -> Tensor:
    """Patches (B, N, D) of pixels (B, 3, H, W)."""
    return convolution(pixels.to(convolution.weight.dtype)).flatten(2).transpose(1, 2)


def _with_class_token(embeddings: Any, class_token: Tensor, patches: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, 1 + N, D) with positions: the class token, then patches (B, N, D)."""
    tokens = torch.cat([class_token.expand(len(patches), 1, -1), patches], dim=1)
    return tokens + embeddings.interpolate_pos_encoding(tokens, height, width)
