"""DINOv2: DINO's crops, iBOT's hidden patches, and KoLeo to spread the pooled outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from assistant.towers import Tower
from training.data.augment import block_mask
from training.data.pictures import Picture
from training.distillation_losses import crops_loss, patches_loss, sinkhorn_knopp
from training.objective import Start, given_tower
from training.picture_decoder import take
from training.self_distillation import (
    LARGE_CROPS,
    Area,
    Crops,
    SelfDistillation,
    SelfDistillationSettings,
    patch_embedding_names,
    spread,
)
from training.teacher import Teacher, names_outside_teachers, target_facts


class Settings(SelfDistillationSettings):
    """What a recipe may say of DINOv2; the defaults are those of the authors' code."""

    teacher_temperature: float = Field(0.07, gt=0, le=1, description="the teacher's after its warm-up")
    momentum: float = Field(0.992, ge=0, le=1, description="of the teacher at step 0; a cosine takes it to 1")
    masked_crops: float = Field(0.5, gt=0, le=1, description="chance that a large crop has hidden patches")
    masked: Area = Field((0.1, 0.5), description="least and largest share of the patches hidden in such a crop")
    patches_weight: float = Field(1.0, ge=0, description="of the loss on hidden patches")
    koleo_weight: float = Field(0.1, ge=0, description="of the loss that spreads the pooled outputs")
    separate_patch_head: bool = Field(True, description="a head of their own for patches, better at scale")
    sinkhorn_iterations: int = Field(3, ge=1, description="of Sinkhorn-Knopp on the teacher's scores")
    patch_embedding_rate: float = Field(
        0.2, gt=0, le=1, description="share of the learning rate of the patch embedding"
    )


@dataclass(frozen=True)
class MaskedCrops(Crops):
    """Crops, and which patches of the large ones are hidden: bool (2, N)."""

    hidden: Tensor


class DinoV2Objective(SelfDistillation):
    """DINOv2 (Oquab et al. 2023, section 4) of any tower with patch tokens.

    Deviations: whether a crop is masked, and how much, is drawn for each crop alone (the authors spread both evenly
    over a batch of one process); KoLeo looks for neighbours among all ranks. Layer scale and stochastic depth belong to
    the tower's shape.
    """

    settings: Settings

    def __init__(self, tower: Tower, side: int, settings: Settings) -> None:
        """`side`: pixels of a large crop. Raises ValueError when tower, crops and masks do not fit each other."""
        if not tower.has_patch_tokens:
            raise ValueError(
                "dinov2 hides patches, and this tower has no patch tokens (it is a ResNet): "
                "take a clip, siglip, dinov2 or vit tower, or pretrain this one with dino or moco"
            )
        super().__init__(tower, side, settings, prototype_lengths=False)
        self.grid = tower.grid(side, side)
        patches = self.grid[0] * self.grid[1]
        self.most_hidden = round(settings.masked[1] * patches)
        if round(settings.masked[0] * patches) < 1:
            raise ValueError(f"masked: {settings.masked[0]} of {patches} patches is none; take a larger share or side")
        if settings.separate_patch_head:
            self.patch_head = self.new_head(prototype_lengths=False)
            self.teacher_patch_head = Teacher(self.patch_head)
        if tower.own_mask_token() is None:
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tower.width), std=0.02))
        self.patch_embedding = {f"tower.{name}" for name in patch_embedding_names(tower)}

    def sample(self, picture: Picture, generator: np.random.Generator) -> MaskedCrops:
        """Crops, and blocks of hidden patches for some of the large ones."""
        crops = super().sample(picture, generator)
        hidden = [self._mask(generator) for _ in range(LARGE_CROPS)]
        return MaskedCrops(crops.large, crops.small, torch.stack(hidden))

    def _mask(self, generator: np.random.Generator) -> Tensor:
        """bool (N,), all False for a crop that is not masked."""
        share = generator.uniform(*self.settings.masked)
        if generator.random() >= self.settings.masked_crops:
            share = 0.0
        rows, columns = self.grid
        return block_mask(rows, columns, share, generator)

    def collate(self, samples: Sequence[Any]) -> Mapping[str, Tensor]:
        """large (B, 2, 3, H, W) and small (B, n, 3, h, w), uint8; hidden (B, 2, N) bool."""
        return {**super().collate(samples), "hidden": torch.stack([sample.hidden for sample in samples])}

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """From large (b, 2, 3, H, W), small (b, n, 3, h, w) and hidden (b, 2, N), what the losses need.

        Pooled outputs: student (b, 2 + n, D) and teacher (b, 2, D). Patches: student_patches and teacher_patches
        (b, 2, M, D), the hidden ones first, then others up to the most that may be hidden; counts (b, 2) says how many
        are hidden.
        """
        large, small, hidden = batch["large"], batch["small"], batch["hidden"].flatten(0, 1)
        crops = large.shape[:2]
        pixels = self.tower.normalise(large.flatten(0, 1))
        first = hidden.byte().argsort(dim=1, descending=True, stable=True)[:, : self.most_hidden]
        with torch.no_grad():
            teacher = self.teacher_tower.model(pixels)
        student = self.tower(pixels, hidden=hidden, mask_token=self._mask_token())
        return {
            "student": self.with_small(student.pooled.unflatten(0, crops), small),
            "teacher": teacher.pooled.unflatten(0, crops),
            "student_patches": take(student.patches, first).unflatten(0, crops),
            "teacher_patches": take(teacher.patches, first).unflatten(0, crops),
            "counts": hidden.sum(1).unflatten(0, crops),
        }

    def _mask_token(self) -> Tensor:
        own = self.tower.own_mask_token()
        return (self.mask_token if own is None else own)[0]

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """DINO's loss, iBOT's, KoLeo, and how far apart the teacher's pooled outputs are."""
        settings = self.settings
        student, teacher = representations["student"], representations["teacher"].detach()
        scores = self.head(student)
        targets = self._targets(teacher, self.teacher_head)
        loss = crops_loss(scores, targets, settings.student_temperature)
        return {
            "crops_loss": loss,
            "patches_loss": settings.patches_weight * self._patches_loss(representations),
            **self.spreading(student),
            "teacher_spread": spread(teacher[:, 0]),
            **target_facts(targets),
        }

    @torch.no_grad()
    def _targets(self, features: Tensor, head: Teacher) -> Tensor:
        """(..., D) features of the teacher to (..., K) probabilities, centred over the samples of all ranks."""
        scores = head.model(features)
        balanced = sinkhorn_knopp(scores.flatten(0, -2), self.temperature, self.settings.sinkhorn_iterations)
        return balanced.view(scores.shape)

    def _patches_loss(self, representations: dict[str, Tensor]) -> Tensor:
        """iBOT's loss: the mean over a crop's hidden patches, then over all crops, those with none hidden too."""
        counts = representations["counts"]
        student, teacher = representations["student_patches"], representations["teacher_patches"].detach()
        is_hidden = torch.arange(student.shape[2], device=counts.device) < counts[..., None]
        weights = (1.0 / counts.clamp_min(1) / counts.numel())[..., None].expand_as(is_hidden)[is_hidden]
        head, teacher_head = self.head, self.teacher_head
        if self.settings.separate_patch_head:
            head, teacher_head = self.patch_head, self.teacher_patch_head
        targets = self._targets(teacher[is_hidden], teacher_head)
        return patches_loss(head(student[is_hidden]), targets, weights, self.settings.student_temperature)

    def trained_parameters(self) -> set[str]:
        """Everything but the teachers."""
        return names_outside_teachers(self)

    def rate_of(self, name: str) -> float:
        """Less for the patch embedding."""
        return self.settings.patch_embedding_rate if name in self.patch_embedding else 1.0


def build(settings: Settings, start: Start) -> DinoV2Objective:
    """DINOv2 of `start.tower`. Raises ValueError when there is none, or crops or masks do not fit it."""
    return DinoV2Objective(given_tower(start, "dinov2"), start.side, settings)
