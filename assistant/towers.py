"""One face for CLIP, SigLIP, DINOv2, ViT and ResNet towers: their geometry, pixels, patches and files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from assistant.checkpoint import load_llava, load_model
from assistant.fusion import FEATURE_LAYER, squeezing
from assistant.models import ModelError, find_tower, read_json
from assistant.tower_families import ResNet, TowerOutput, TransformerFamily, family_of, layer_numbers
from assistant.tower_shapes import (
    ResNetShape,
    TextShape,
    ViTShape,
    clip_tokenizer,
    new_image_processor,
    new_model,
    new_pair,
    output_side,
)
from assistant.weight_files import write_model

__all__ = [
    "ResNetShape",
    "TextShape",
    "Tower",
    "TowerOutput",
    "ViTShape",
    "clip_tokenizer",
    "load_tower",
    "new_image_processor",
    "new_pair",
    "new_tower",
    "normalised",
    "plain_vit",
]

# What a ViT and a ViTMAE's encoder both say of themselves.
SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "qkv_bias",
)


class Tower(nn.Module):
    """A vision tower of any family that `FAMILIES` holds; `model` is transformers' bare vision model."""

    def __init__(self, model: PreTrainedModel, image_processor: BaseImageProcessor) -> None:
        """Raises ModelError for a model of another class, or one with a part that no output depends on."""
        super().__init__()
        if isinstance(model, ViTModel) and model.pooler is not None:
            raise ModelError("a ViT tower has no pooling layer: make the ViTModel with add_pooling_layer=False")
        self.model = model
        self.image_processor = image_processor
        self._family = family_of(model)
        self.width = self._family.width(model)
        self.patch_size = self._family.patch_size(model)
        self.image_side = int(getattr(model.config, "image_size", 0)) or output_side(image_processor)
        self.has_patch_tokens = isinstance(self._family, TransformerFamily)
        self._layer_of = {f"model.{name}": number for name, number in layer_numbers(model).items()}

    @property
    def layers(self) -> Sequence[nn.Module]:
        """Its layers (stages of a ResNet), first to last."""
        return self._family.layers(self.model)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that size in pixels.

        A remainder is cut off, as the patch embedding does; a ResNet pads instead. Raises ValueError where no patch
        fits in.
        """
        pixels = (height, width)
        if not self.has_patch_tokens:
            pixels = (height + self.patch_size - 1, width + self.patch_size - 1)
        rows, columns = (side // self.patch_size for side in pixels)
        if rows < 1 or columns < 1:
            raise ValueError(f"a picture of {width} x {height} pixels is smaller than a patch of {self.patch_size}")
        return rows, columns

    def normalise(self, views: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32, with this tower's own scale, mean and deviation."""
        return normalised(views, self.image_processor)

    def forward(
        self,
        pixels: Tensor,
        visible: Tensor | None = None,
        hidden: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> TowerOutput:
        """Patches (B, N, D) and pooled (B, D) of normalised pixels (B, 3, H, W) of any size.

        Args:
            pixels: as `normalise` gives them. Position embeddings are interpolated to their size.
            visible: int64 (B, n). Only these patches enter the first layer, and `patches` is (B, n, D) in their order.
            hidden: bool (B, N). The embeddings of these patches are replaced by `mask_token`, before positions.
            mask_token: (D,) or (1, D).

        Raises:
            ValueError: a picture smaller than a patch, hidden patches without a mask token or of another number, or
                anything to hide or leave out in a ResNet.
        """
        self.grid(pixels.shape[-2], pixels.shape[-1])  # sees that there is a patch at all
        family = self._family
        if isinstance(family, ResNet):
            if visible is not None or hidden is not None:
                raise ValueError("a ResNet has no patch tokens: none can be hidden or left out")
            return family.run(self.model, pixels)
        patches = family.embed(self.model, pixels)
        if hidden is not None:
            patches = _hide(patches, hidden, mask_token)
        tokens = family.place(self.model, patches, pixels.shape[-2], pixels.shape[-1])
        if visible is not None:
            tokens = _keep(tokens, visible, family.leading(self.model))
        tokens = family.enter(self.model, tokens)
        for layer in self.layers:
            tokens = layer(tokens, None)
        return family.leave(self.model, tokens)

    @property
    def layers_looked_at(self) -> Sequence[nn.Module]:
        """Those before the features that a language model is joined to."""
        return self.layers[: len(self.layers) + 1 + FEATURE_LAYER]

    def features(self, pixels: Tensor) -> Tensor:
        """(B, N, D): the patches as a language model looks at them, a layer before the last one, not normalised.

        Of normalised pixels (B, 3, H, W). Raises ValueError for a ResNet, which has no patch tokens.
        """
        family = self._family
        if isinstance(family, ResNet):
            raise ValueError("a ResNet has no patch tokens for a language model to look at")
        tokens = family.place(self.model, family.embed(self.model, pixels), pixels.shape[-2], pixels.shape[-1])
        tokens = family.enter(self.model, tokens)
        for layer in self.layers_looked_at:
            tokens = layer(tokens, None)
        return tokens[:, family.leading(self.model) :]

    def own_mask_token(self) -> nn.Parameter | None:
        """DINOv2's mask token (1, D), which its checkpoints hold; None for the others."""
        token = getattr(getattr(self.model, "embeddings", None), "mask_token", None)
        return token if isinstance(token, nn.Parameter) else None

    def layer_of(self, name: str) -> int:
        """Where a parameter of this module stands: 0 in the embeddings, i + 1 in layer i, one more behind the last.

        Raises ValueError for a name that is no parameter's.
        """
        if name not in self._layer_of:
            raise ValueError(f"{name} is no parameter of this tower")
        return self._layer_of[name]

    def save(self, folder: Path) -> None:
        """Write what `AutoModel` and `AutoImageProcessor` load: a plain transformers checkpoint."""
        write_model(self.model, folder)
        self.image_processor.save_pretrained(folder)


def _hide(patches: Tensor, hidden: Tensor, mask_token: Tensor | None) -> Tensor:
    """`patches` (B, N, D) with `mask_token` (D,) where `hidden` (B, N) says so."""
    if mask_token is None:
        raise ValueError("hidden patches need a mask_token to stand in their place")
    if hidden.shape != patches.shape[:2]:
        raise ValueError(f"hidden is {tuple(hidden.shape)} and there are {tuple(patches.shape[:2])} patches")
    return torch.where(hidden[..., None], mask_token.to(patches.dtype), patches)


def _keep(tokens: Tensor, visible: Tensor, leading: int) -> Tensor:
    """(B, leading + n, D): the leading tokens, then the patches that `visible` (B, n) names, in its order."""
    patches = tokens[:, leading:]
    kept = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
    return torch.cat([tokens[:, :leading], kept], dim=1) if leading else kept


def normalised(views: Tensor, image_processor: BaseImageProcessor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, with the scale, mean and deviation of `image_processor`."""
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    mean, deviation = (0.0,) * 3, (1.0,) * 3
    if image_processor.do_normalize:
        mean, deviation = image_processor.image_mean, image_processor.image_std
    divisor = torch.tensor(deviation)[:, None, None]
    scale, shift = factor / divisor, torch.tensor(mean)[:, None, None] / divisor
    return torch.mul(views, scale.to(views.device)).sub_(shift.to(views.device))


def new_tower(shape: ViTShape | ResNetShape) -> Tower:
    """A tower of that shape with random weights (torch's default generator) and its image processor."""
    family = "resnet" if isinstance(shape, ResNetShape) else shape.family
    return Tower(new_model(shape), new_image_processor(family, shape.image_side))


def load_tower(source: str | Path) -> Tower:
    """The tower in `source`, a folder or a hub name: bare, of a CLIP or SigLIP with both halves, or of a LLaVA.

    Raises ModelError where it cannot be found, holds no tower of a family we know, or is damaged.
    """
    folder = find_tower(source)
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in _LOADERS:
        raise ModelError(f"{folder} holds a {kind}, which has no tower we know; known are: {', '.join(_LOADERS)}")
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: the image processor cannot be read: {str(error).splitlines()[0]}") from error
    model = _LOADERS[kind](folder)
    if kind == LlavaNextConfig.model_type:  # alone, a tower sees one square of a picture and no tiles
        image_processor = squeezing(model, output_side(image_processor), image_processor)
    return Tower(model, image_processor)


def _load_bare(model_class: type[PreTrainedModel], **arguments: Any) -> Callable[[Path], PreTrainedModel]:
    return lambda folder: load_model(model_class, folder, **arguments)


def _load_half(model_class: type[PreTrainedModel]) -> Callable[[Path], PreTrainedModel]:
    return lambda folder: load_model(model_class, folder).vision_model


def _load_vit_mae(folder: Path) -> PreTrainedModel:
    return plain_vit(load_model(ViTMAEForPreTraining, folder))


def plain_vit(masked: ViTMAEForPreTraining) -> ViTModel:
    """The encoder of a masked autoencoder as a ViT, which sees every patch."""
    vit = ViTModel(ViTConfig(**{name: getattr(masked.config, name) for name in SHARED}), add_pooling_layer=False)
    vit.load_state_dict(masked.vit.state_dict())
    return vit


def _load_from_llava(folder: Path) -> PreTrainedModel:
    return load_llava(folder)[0].model.vision_tower


# By what `config.json` says the weights are of.
_LOADERS: dict[str, Callable[[Path], PreTrainedModel]] = {
    CLIPVisionConfig.model_type: _load_bare(CLIPVisionModel),
    SiglipVisionConfig.model_type: _load_bare(SiglipVisionModel),
    Dinov2Config.model_type: _load_bare(Dinov2Model),
    Dinov2WithRegistersConfig.model_type: _load_bare(Dinov2WithRegistersModel),
    ViTConfig.model_type: _load_bare(ViTModel, add_pooling_layer=False),
    ViTMAEConfig.model_type: _load_vit_mae,
    ResNetConfig.model_type: _load_bare(ResNetModel),
    CLIPConfig.model_type: _load_half(CLIPModel),
    SiglipConfig.model_type: _load_half(SiglipModel),
    LlavaConfig.model_type: _load_from_llava,
    LlavaNextConfig.model_type: _load_from_llava,
}
