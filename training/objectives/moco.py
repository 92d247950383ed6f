"""MoCo v3: the query of each view finds the key that an averaged encoder gave the other view."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from assistant.towers import Tower
from training.data.augment import byol_views
from training.data.pictures import Picture
from training.gather import gather, rank, ranks
from training.heads import mlp_head
from training.objective import (
    Start,
    TrainsTower,
    Watched,
    WholeBatchObjective,
    check_side,
    given_tower,
    mask_token_names,
)
from training.schedules import cosine
from training.self_distillation import Area, patch_embedding_names, spread
from training.strict import Strict
from training.teacher import Teacher, names_outside_teachers


class Settings(Strict):
    """What a recipe may say of MoCo v3; the defaults are those of the authors' code for a ViT."""

    temperature: float = Field(0.2, gt=0, le=1, description="the authors' ResNet has 1")
    momentum: float = Field(0.99, ge=0, le=1, description="of the averaged encoder at step 0; a cosine takes it to 1")
    area: Area = Field((0.08, 1.0), description="least and largest share of the picture in a view")
    projection: int = Field(256, ge=1, description="width of queries and keys")
    head_hidden: int = Field(4096, ge=1, description="width between the layers of projector and predictor")
    projector_layers: int = Field(3, ge=1, description="the authors' ResNet has 2")
    predictor_layers: int = Field(2, ge=1)
    predictor_norm: bool = Field(True, description="batch norm behind the predictor; the authors' ResNet has none")
    freeze_patch_embedding: bool = Field(True, description="steadier (section 4.1 of the paper); a ResNet has none")


class MocoObjective(TrainsTower, WholeBatchObjective):
    """MoCo v3 (Chen et al. 2021, algorithm 1) of any tower: no queue, keys of the whole step over all ranks.

    Both views go through the tower together. Batch norm in the heads is over all ranks, each view for itself; that of a
    ResNet tower is over both views of a micro-batch. The averaged encoder moves after the step, not before it.
    """

    def __init__(self, tower: Tower, side: int, settings: Settings) -> None:
        """`side`: pixels of a view. Raises ValueError when the tower's patches do not divide it."""
        super().__init__()
        check_side(tower, side)
        self.settings = settings
        self.side = side
        self.tower = tower
        width, hidden = settings.projection, settings.head_hidden
        self.projector = mlp_head(tower.width, hidden, width, settings.projector_layers, last_norm=True)
        self.predictor = mlp_head(width, hidden, width, settings.predictor_layers, last_norm=settings.predictor_norm)
        self.teacher_tower = Teacher(tower)
        self.teacher_projector = Teacher(self.projector)

    def sample(self, picture: Picture, generator: np.random.Generator) -> Tensor:
        """BYOL's asymmetric pair of views: (2, 3, side, side) uint8."""
        return torch.stack(byol_views(picture.pixels, self.side, generator, self.settings.area))

    def collate(self, samples: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """views (B, 2, 3, H, W) uint8."""
        return {"views": torch.stack(list(samples))}

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """From views (b, 2, 3, H, W): pooled outputs of student and teacher, each (b, 2, D)."""
        views = batch["views"]
        pixels = self.tower.normalise(views.flatten(0, 1))
        with torch.no_grad():
            teacher = self.teacher_tower.model(pixels).pooled
        student = self.tower(pixels).pooled
        return {
            "student": student.unflatten(0, views.shape[:2]),
            "teacher": teacher.unflatten(0, views.shape[:2]),
        }

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The symmetric loss, and how far apart the pooled outputs are."""
        student, teacher = representations["student"], representations["teacher"].detach()
        queries = [self.predictor(self.projector(student[:, view])) for view in (0, 1)]
        with torch.no_grad():
            keys = [self.teacher_projector.model(teacher[:, view]) for view in (0, 1)]
        temperature = self.settings.temperature
        loss = keys_loss(queries[0], keys[1], temperature) + keys_loss(queries[1], keys[0], temperature)
        return {"keys_loss": loss, "student_spread": spread(student[:, 0])}

    def after_step(self, step: int, steps: int) -> None:
        """Move the averaged encoder."""
        momentum = cosine(self.settings.momentum, 1.0, step, steps)
        self.teacher_tower.update(momentum)
        self.teacher_projector.update(momentum)

    def watched(self, samples: int) -> Watched:
        """The tower; guessing evenly among the keys of a step costs the log of their number, in both directions."""
        return Watched(self.tower, untaught={"keys_loss": 4 * self.settings.temperature * math.log(samples)})

    def trained_parameters(self) -> set[str]:
        """All but the averaged encoder, a mask token, and the patch embedding when that is frozen."""
        still = mask_token_names(self.tower)
        if self.settings.freeze_patch_embedding:
            still |= patch_embedding_names(self.tower)
        return names_outside_teachers(self) - {f"tower.{name}" for name in still}


def keys_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """2 x temperature x the mean cross-entropy of finding each query's own key among all ranks' (algorithm 1, `ctr`).

    Args:
        queries: (B, D) of this rank, with gradient; they are brought to unit length.
        keys: (B, D) of this rank, in the same order; without gradient.
        temperature: what the cosines are divided by.

    fp32 inside. Raises ValueError when there is a single key, which is found without looking.
    """
    if len(keys) * ranks() < 2:
        raise ValueError("MoCo compares the samples of a step, and this one has a single sample: raise the batch size")
    queries = functional.normalize(queries.float(), dim=1)
    everyone = gather(functional.normalize(keys.float(), dim=1))
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ everyone.T / temperature
    own = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return 2 * temperature * functional.cross_entropy(scores, own)


def build(settings: Settings, start: Start) -> MocoObjective:
    """MoCo v3 of `start.tower`. Raises ValueError when there is none, or the views do not fit it."""
    return MocoObjective(given_tower(start, "moco"), start.side, settings)
