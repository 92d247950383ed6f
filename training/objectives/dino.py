"""DINO: the student scores every crop of a picture as the teacher scores another, large one."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from assistant.towers import Tower
from training.distillation_losses import Centre, crops_loss
from training.objective import Start, given_tower
from training.self_distillation import SelfDistillation, SelfDistillationSettings, spread
from training.teacher import target_facts


class Settings(SelfDistillationSettings):
    """What a recipe may say of DINO; the defaults are the paper's for ViT-S/16."""

    centre_momentum: float = Field(0.9, ge=0, lt=1, description="of the mean that is taken off the teacher's scores")
    prototype_lengths: bool = Field(False, description="train the lengths of prototypes too: better and less stable")


class DinoObjective(SelfDistillation):
    """DINO (Caron et al. 2021) of any tower, with its centring, sharpening and multi-crop.

    Crops of one size go through the tower together. The centre moves once a step, by the mean over all its samples.
    """

    settings: Settings

    def __init__(self, tower: Tower, side: int, settings: Settings) -> None:
        """`side`: pixels of a large crop. Raises ValueError when tower and crops do not fit each other."""
        super().__init__(tower, side, settings, settings.prototype_lengths)
        self.centre = Centre(settings.prototypes, settings.centre_momentum)

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """From large (b, 2, 3, H, W) and small (b, n, 3, h, w): student (b, 2 + n, D), teacher (b, 2, D)."""
        large, small = batch["large"], batch["small"]
        pixels = self.tower.normalise(large.flatten(0, 1))
        with torch.no_grad():
            teacher = self.teacher_tower.model(pixels).pooled.unflatten(0, large.shape[:2])
        student = self.tower(pixels).pooled.unflatten(0, large.shape[:2])
        return {"student": self.with_small(student, small), "teacher": teacher}

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """DINO's loss, KoLeo where it has a weight, and how far apart the teacher's pooled outputs are."""
        teacher = representations["teacher"].detach()
        with torch.no_grad():
            scores = self.teacher_head.model(teacher)
        targets = self.centre.probabilities(scores, self.temperature)
        if self.training:
            self.centre.remember(scores)
        student = representations["student"]
        loss = crops_loss(self.head(student), targets, self.settings.student_temperature)
        return {
            "crops_loss": loss,
            **self.spreading(student),
            "teacher_spread": spread(teacher[:, 0]),
            **target_facts(targets),
        }

    def after_step(self, step: int, steps: int) -> None:
        """Move the teacher and the centre."""
        super().after_step(step, steps)
        self.centre.update()


def build(settings: Settings, start: Start) -> DinoObjective:
    """DINO of `start.tower`. Raises ValueError when there is none, or the crops do not fit it."""
    return DinoObjective(given_tower(start, "dino"), start.side, settings)
