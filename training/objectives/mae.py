"""Masked autoencoding: the tower sees a quarter of a picture's patches, and a light decoder draws the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from assistant.towers import Tower
from assistant.weight_files import write_weights
from training.data.augment import mirror, random_crop
from training.data.pictures import Picture
from training.objective import Objective, Start, TrainsTower, Watched, check_side, given_tower, mask_token_names
from training.picture_decoder import PictureDecoder, others, patchify, take, unpatchify
from training.strict import Strict

DECODER_FOLDER = "decoder"  # inside the exported tower's, so that the tower itself stays a plain checkpoint
DECODER_SETTINGS = "settings.json"
DECODER_WEIGHTS = "model.safetensors"
VARIANCE_EPSILON = 1e-6  # the paper's code: keeps a patch of one colour from being divided by zero


class Settings(Strict):
    """What a recipe may say of masked autoencoding."""

    masked: float = Field(0.75, gt=0, lt=1, description="share of the patches that the tower does not see")
    smallest_crop: float = Field(0.2, gt=0, le=1, description="smallest share of a picture's area in a view")
    decoder_width: int = Field(256, ge=16, description="channels of the decoder; the paper's ViT-L has 512")
    decoder_layers: int = Field(4, ge=1, description="layers of the decoder; the paper's ViT-L has 8")
    decoder_heads: int = Field(8, ge=1, description="attention heads of the decoder; the paper's ViT-L has 16")
    normalise_target: bool = Field(True, description="predict each patch with its own mean and deviation taken out")


@dataclass(frozen=True)
class MaskedView:
    """One view, uint8 (3, side, side), and the places (n,) of the patches that the tower may see, rising."""

    view: Tensor
    visible: Tensor


class MaeObjective(TrainsTower, Objective):
    """Masked autoencoding (He et al. 2022) of any tower with patch tokens.

    The loss is a mean over masked patches, and every picture masks as many: so a mean over micro-batches of equal size
    is the mean over the step, and accumulation is right as it is.

    The decoder sees the tower's pooled output beside the patches, as the paper's sees the class token: so what only the
    pooled output needs (SigLIP's attention head, CLIP's last norm) is trained too.
    """

    def __init__(self, tower: Tower, side: int, settings: Settings) -> None:
        """Raises ValueError for a tower without patch tokens, and for a side that leaves nothing to see or to mask."""
        super().__init__()
        if not tower.has_patch_tokens:
            raise ValueError(
                "mae hides patches before the first layer, and this tower has no patch tokens (it is a ResNet): "
                "take a clip, siglip, dinov2 or vit tower, or pretrain this one with simclr or moco"
            )
        check_side(tower, side)
        self.tower = tower
        self.side = side
        self.settings = settings
        self.grid = tower.grid(side, side)
        self.patches = self.grid[0] * self.grid[1]
        self.seen = round(self.patches * (1 - settings.masked))
        if not 0 < self.seen < self.patches:
            raise ValueError(
                f"masked: {settings.masked} of {self.patches} patches leaves {self.seen} to see: there has to be at "
                "least one to see and one to predict; take a larger side or another share"
            )
        self.decoder = PictureDecoder(
            encoder_width=tower.width,
            patch_values=3 * tower.patch_size**2,
            width=settings.decoder_width,
            layers=settings.decoder_layers,
            heads=settings.decoder_heads,
        )

    def sample(self, picture: Picture, generator: np.random.Generator) -> MaskedView:
        """One crop, mirrored half the time, and which of its patches are seen (the paper's appendix A.1)."""
        area = (self.settings.smallest_crop, 1.0)
        view = mirror(random_crop(picture.pixels, self.side, generator, area), generator)
        visible = np.sort(generator.permutation(self.patches)[: self.seen])
        return MaskedView(view, torch.from_numpy(visible))

    def collate(self, samples: Sequence[MaskedView]) -> Mapping[str, Tensor]:
        """views (B, 3, side, side) uint8 and visible (B, n) int64."""
        return {
            "views": torch.stack([sample.view for sample in samples]),
            "visible": torch.stack([sample.visible for sample in samples]),
        }

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Mean squared error on the masked patches."""
        pixels = self.tower.normalise(batch["views"])
        masked = others(batch["visible"], self.patches)
        predicted = self._predict(pixels, batch["visible"], masked)
        target = take(patchify(pixels, self.tower.patch_size), masked)
        return {"pixel_loss": pixel_loss(predicted, target, self.settings.normalise_target)}

    def _predict(self, pixels: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
        """(B, m, C * patch * patch) values of the patches `wanted` (B, m), from those that `visible` (B, n) names."""
        seen = self.tower(pixels, visible=visible)
        grid = self.tower.grid(pixels.shape[-2], pixels.shape[-1])
        return self.decoder(seen.patches, seen.pooled, visible, wanted, grid)

    @torch.no_grad()
    def reconstruct(self, views: Tensor, visible: Tensor) -> Tensor:
        """Whole pictures (B, 3, H, W) uint8: `visible` (B, n) patches of `views` as they are, the others predicted.

        `views` (B, 3, H, W) uint8 may have any side that the patch size divides. A model that predicts normalised
        patches says nothing of a patch's brightness and contrast: then those are taken from the hidden patch itself, so
        that such a drawing shows more than the model knows.
        """
        patch, grid = self.tower.patch_size, self.tower.grid(views.shape[-2], views.shape[-1])
        pixels = self.tower.normalise(views)
        masked = others(visible, grid[0] * grid[1])
        predicted = self._predict(pixels, visible, masked).float()
        if self.settings.normalise_target:
            mean, deviation = _mean_and_deviation(take(patchify(pixels, patch), masked))
            predicted = predicted * deviation + mean
        rows = patchify(pixels, patch).scatter(1, masked[..., None].expand_as(predicted), predicted)
        drawn = self._to_bytes(unpatchify(rows, patch, *grid))
        hidden = torch.zeros_like(rows).scatter(1, masked[..., None].expand_as(predicted), 1.0)
        return torch.where(unpatchify(hidden, patch, *grid) > 0, drawn, views)

    def _to_bytes(self, pixels: Tensor) -> Tensor:
        """The inverse of the tower's normalisation, rounded and cut to uint8."""
        black, white = (self.tower.normalise(torch.full((1, 3, 1, 1), v, dtype=torch.uint8)) for v in (0, 255))
        black, white = black.to(pixels.device), white.to(pixels.device)
        return ((pixels - black) / (white - black) * 255).round().clamp(0, 255).to(torch.uint8)

    def watched(self, samples: int) -> Watched:
        """The tower by its patches: nothing trains its pooled output."""
        return Watched(self.tower, pooled=False)

    def trained_parameters(self) -> set[str]:
        """Tower and decoder; not the tower's own mask token: hidden patches do not enter it."""
        still = {f"tower.{name}" for name in mask_token_names(self.tower)}
        return {name for name, _ in self.named_parameters()} - still

    def export(self, folder: Path) -> None:
        """The tower, a plain transformers checkpoint, and in its folder `decoder` what draws pictures back."""
        super().export(folder)
        beside = folder / DECODER_FOLDER
        beside.mkdir(exist_ok=True)
        (beside / DECODER_SETTINGS).write_text(self.settings.model_dump_json(indent=2) + "\n")
        write_weights(self.decoder.state_dict(), beside / DECODER_WEIGHTS)


def build(settings: Settings, start: Start) -> MaeObjective:
    """Masked autoencoding of `start.tower`. Raises ValueError when there is none, or it cannot be masked."""
    return MaeObjective(given_tower(start, "mae"), start.side, settings)


def pixel_loss(predicted: Tensor, target: Tensor, normalise: bool) -> Tensor:
    """Mean squared error of `predicted` to `target` (both (B, m, P)), in fp32.

    With `normalise` each target patch has its own mean taken out and is divided by its own deviation (He et al. 2022,
    section 3, "reconstruction target"; the unbiased variance plus 1e-6, as in the authors' code).
    """
    target = target.float()
    if normalise:
        mean, deviation = _mean_and_deviation(target)
        target = (target - mean) / deviation
    return functional.mse_loss(predicted.float(), target)


def _mean_and_deviation(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Each (B, m, 1), of the values of a patch."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + VARIANCE_EPSILON).sqrt()
