"""SimCLR: two views of a picture find each other among the views of all pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from assistant.towers import Tower
from training.comparison import refuse_one_sample, share_found
from training.contrastive_losses import nt_xent_loss
from training.data.augment import simclr_view
from training.data.pictures import Picture
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
from training.strict import Strict


class Settings(Strict):
    """What a recipe may say of SimCLR; the defaults are the paper's for ImageNet."""

    temperature: float = Field(0.1, ge=1 / 700, le=10, description="what cosines are divided by; small data likes 0.5")
    smallest_crop: float = Field(0.08, gt=0, le=1, description="smallest share of a picture's area in a view")
    strength: float = Field(1.0, ge=0, le=2, description="of the colour jitter")
    head_hidden: int = Field(2048, ge=1, description="width between the layers of the head")
    projection: int = Field(128, ge=1, description="width of what is compared")
    head_layers: int = Field(2, ge=1, description="linear layers of the head; SimCLR v2 has 3")
    batch_norm: bool = Field(True, description="batch norm in the head")


class SimclrObjective(TrainsTower, WholeBatchObjective):
    """SimCLR (Chen et al. 2020) of any tower.

    The head works on the whole step, so its batch norm sees all micro-batches, both views and all ranks, as the paper's
    does. Batch norm inside a ResNet tower sees the views of a micro-batch only.
    """

    def __init__(self, tower: Tower, side: int, settings: Settings) -> None:
        """`side`: pixels of a view. Raises ValueError when the tower's patches do not divide it."""
        super().__init__()
        check_side(tower, side)
        self.settings = settings
        self.side = side
        self.tower = tower
        self.head = mlp_head(
            tower.width, settings.head_hidden, settings.projection, settings.head_layers, settings.batch_norm
        )

    def sample(self, picture: Picture, generator: np.random.Generator) -> Tensor:
        """Two views, (2, 3, side, side) uint8."""
        area = (self.settings.smallest_crop, 1.0)
        return torch.stack(
            [simclr_view(picture.pixels, self.side, generator, self.settings.strength, area) for _ in range(2)]
        )

    def collate(self, samples: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """views (B, 2, 3, side, side) uint8."""
        return {"views": torch.stack(list(samples))}

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """From views (b, 2, 3, H, W): the tower's pooled output (b, 2, D)."""
        views = batch["views"]
        pooled = self.tower(self.tower.normalise(views.flatten(0, 1))).pooled
        return {"pooled": pooled.unflatten(0, views.shape[:2])}

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """NT-Xent over all ranks, and how often the best of this rank's other views is of the same picture."""
        pooled = representations["pooled"]
        refuse_one_sample(len(pooled), self.training)
        first, second = self.head(pooled.transpose(0, 1).flatten(0, 1)).chunk(2)
        views = functional.normalize(torch.cat([first, second]).detach().float(), dim=-1)
        picture = torch.arange(len(pooled), device=pooled.device)
        found = share_found(views[: len(pooled)], views, picture, picture.repeat(2), first_are_same=True)
        return {"nt_xent_loss": nt_xent_loss(first, second, self.settings.temperature), "view_finds_view": found}

    def watched(self, samples: int) -> Watched:
        """The tower; guessing evenly among the other views of a step costs the log of their number."""
        untaught = {"nt_xent_loss": math.log(2 * samples - 1)}
        return Watched(self.tower, untaught=untaught, finds=("view_finds_view",))

    def trained_parameters(self) -> set[str]:
        """Tower and head, without a mask token: nothing is hidden here."""
        still = {f"tower.{name}" for name in mask_token_names(self.tower)}
        return {name for name, _ in self.named_parameters()} - still


def build(settings: Settings, start: Start) -> SimclrObjective:
    """SimCLR of `start.tower`. Raises ValueError when there is none, or the views do not fit it."""
    return SimclrObjective(given_tower(start, "simclr"), start.side, settings)
