"""What objectives with an averaged teacher share, above all DINO and DINOv2: crops, schedules, what moves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional

from assistant.towers import Tower
from training.data.augment import multi_crop
from training.data.pictures import Picture
from training.distillation_losses import koleo_loss
from training.gather import ranks
from training.heads import PrototypeHead
from training.objective import TrainsTower, Watched, WholeBatchObjective, check_side, mask_token_names
from training.schedules import cosine, warm_up
from training.strict import Strict
from training.teacher import Teacher, names_outside_teachers

LARGE_CROPS = 2


def _rising_shares(area: tuple[float, float]) -> tuple[float, float]:
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"{area} are not two rising shares above 0 and up to 1")
    return area


Area = Annotated[tuple[float, float], AfterValidator(_rising_shares)]


class SelfDistillationSettings(Strict):
    """What a recipe may say of the crops, the heads and the teacher."""

    small_side: int = Field(96, ge=1, description="pixels of a small crop; those of the two large ones are the stage's")
    small_count: int = Field(8, ge=0, description="small crops a picture")
    large_area: Area = Field((0.32, 1.0), description="least and largest share of the picture in a large crop")
    small_area: Area = Field((0.05, 0.32), description="the same of a small crop")
    prototypes: int = Field(65_536, ge=2, description="how many directions teacher and student are compared along")
    head_hidden: int = Field(2048, ge=1, description="width between the layers of a head")
    head_layers: int = Field(3, ge=1, description="layers of a head before its prototypes")
    bottleneck: int = Field(256, ge=1, description="width of the prototypes")
    student_temperature: float = Field(0.1, gt=0, le=1)
    first_teacher_temperature: float = Field(0.04, gt=0, le=1, description="the teacher's at step 0")
    teacher_temperature: float = Field(0.04, gt=0, le=1, description="the teacher's after its warm-up")
    warm_up: float = Field(0.3, ge=0, le=1, description="share of the steps in which its temperature changes")
    momentum: float = Field(0.996, ge=0, le=1, description="of the teacher at step 0; a cosine takes it to 1")
    frozen_prototypes: float = Field(0.01, ge=0, le=1, description="share of the steps before the prototypes move")
    koleo_weight: float = Field(0.0, ge=0, description="of the loss that spreads the pooled outputs; 0 is without it")


@dataclass(frozen=True)
class Crops:
    """Crops of one picture, uint8: large (2, 3, H, W) and small (n, 3, h, w)."""

    large: Tensor
    small: Tensor


class SelfDistillation(TrainsTower, WholeBatchObjective):
    """A student that learns to score crops as its teacher scores other crops of the same picture.

    The tower that comes out is the teacher's, as the authors publish it. A subclass represents and compares.
    """

    def __init__(self, tower: Tower, side: int, settings: SelfDistillationSettings, prototype_lengths: bool) -> None:
        """`side`: pixels of a large crop. Raises ValueError when tower and crops do not fit each other."""
        super().__init__()
        _check_sides(tower, side, settings)
        self.settings = settings
        self.side = side
        self.tower = tower
        self.head = self.new_head(prototype_lengths)
        self.teacher_tower = Teacher(tower)
        self.teacher_head = Teacher(self.head)
        self.temperature = settings.first_teacher_temperature

    def new_head(self, prototype_lengths: bool) -> PrototypeHead:
        """A head of the settings' sizes with new weights."""
        settings = self.settings
        return PrototypeHead(
            self.tower.width,
            settings.prototypes,
            settings.head_hidden,
            settings.bottleneck,
            settings.head_layers,
            prototype_lengths,
        )

    def teachers(self) -> list[Teacher]:
        """All that follows the student."""
        return [module for module in self.children() if isinstance(module, Teacher)]

    def heads(self) -> dict[str, PrototypeHead]:
        """The student's heads by their names here."""
        return {name: module for name, module in self.named_children() if isinstance(module, PrototypeHead)}

    def sample(self, picture: Picture, generator: np.random.Generator) -> Crops:
        """Two large and the settings' number of small crops."""
        large, small = multi_crop(
            picture.pixels,
            generator,
            large=self.side,
            small=self.settings.small_side,
            small_count=self.settings.small_count,
            large_area=self.settings.large_area,
            small_area=self.settings.small_area,
        )
        empty = torch.empty((0, 3, self.settings.small_side, self.settings.small_side), dtype=torch.uint8)
        return Crops(torch.stack(large), torch.stack(small) if small else empty)

    def collate(self, samples: Sequence[Any]) -> Mapping[str, Tensor]:
        """large (B, 2, 3, H, W) and small (B, n, 3, h, w), uint8."""
        return {
            "large": torch.stack([sample.large for sample in samples]),
            "small": torch.stack([sample.small for sample in samples]),
        }

    def with_small(self, pooled: Tensor, small: Tensor) -> Tensor:
        """Pooled outputs (B, 2, D) of the student and, behind them, those of its small crops (B, n, 3, h, w) uint8.

        All small crops go through the tower at once. Gives (B, 2 + n, D).
        """
        if small.shape[1] == 0:
            return pooled
        behind = self.tower(self.tower.normalise(small.flatten(0, 1))).pooled
        return torch.cat([pooled, behind.unflatten(0, small.shape[:2])], dim=1)

    def spreading(self, student: Tensor) -> dict[str, Tensor]:
        """KoLeo of pooled outputs (B, 2 + n, D), each large crop among those of its place; nothing at a weight of 0.

        Nothing either for one sample that is left over when held-out ones are looked at. Raises ValueError for one in
        training: it has no neighbour.
        """
        alone = not self.training and len(student) * ranks() < 2
        if alone or not self.settings.koleo_weight:
            return {}
        koleo = torch.stack([koleo_loss(student[:, crop]) for crop in range(LARGE_CROPS)]).sum()
        return {"koleo_loss": self.settings.koleo_weight * koleo}

    def begin_step(self, step: int, steps: int) -> None:
        """Set the teacher's temperature."""
        settings = self.settings
        self.temperature = warm_up(
            settings.first_teacher_temperature,
            settings.teacher_temperature,
            step,
            round(settings.warm_up * steps),
        )

    def before_update(self, step: int, steps: int) -> None:
        """Throw the gradients of the prototypes away while they are frozen.

        As in DINO's code they become None, so that the optimiser knows nothing of them; zeros would leave its second
        moments near zero and its first real steps several times too large.
        """
        if step < round(self.settings.frozen_prototypes * steps):
            for head in self.heads().values():
                for weight in head.last_layer():
                    weight.grad = None

    def after_step(self, step: int, steps: int) -> None:
        """Move the teacher."""
        momentum = cosine(self.settings.momentum, 1.0, step, steps)
        for teacher in self.teachers():
            teacher.update(momentum)

    def trained_parameters(self) -> set[str]:
        """All but the teachers, and but the tower's own mask token, which only an objective that hides patches uses."""
        return names_outside_teachers(self) - {f"tower.{name}" for name in mask_token_names(self.tower)}

    def watched(self, samples: int) -> Watched:
        """The teacher's tower."""
        return Watched(self.teacher_tower.model)

    def export(self, folder: Path) -> None:
        """The teacher's tower, a plain transformers checkpoint."""
        self.teacher_tower.model.save(folder)


def patch_embedding_names(tower: Tower) -> set[str]:
    """The parameters of `tower` that turn pixels into patches: its only convolution. None in a ResNet."""
    if not tower.has_patch_tokens:
        return set()
    return {
        f"{place}.{name}"
        for place, module in tower.named_modules()
        if isinstance(module, nn.Conv2d)
        for name, _ in module.named_parameters()
    }


def spread(features: Tensor) -> Tensor:
    """How far apart unit-length features (B, D) point: about 1 when at random, 0 when all are the same (collapsed)."""
    units = functional.normalize(features.detach().float(), dim=-1)
    return units.std(0, correction=0).mean() * units.shape[-1] ** 0.5


def _check_sides(tower: Tower, side: int, settings: SelfDistillationSettings) -> None:
    check_side(tower, side)
    if not settings.small_count:
        return
    small = settings.small_side
    check_side(tower, small, "small_side")
    if small > side:
        raise ValueError(f"small_side: a small crop of {small} pixels is larger than a large one of {side}")
