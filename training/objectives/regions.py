"""Naming regions: every patch of a region names the words for what stands there; no text half is needed.

It teaches a tower that is already joined what it shall tell apart, letters for example, where one sees the signal: a
language model that learns the same by answering needs many times the pictures (docs/decisions.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from assistant.towers import Tower
from training.data.pictures import DataError, Picture, Region
from training.data.views import square
from training.naming import named_patches, naming_loss, regions_of, share_named
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
    """There is nothing to set."""


@dataclass(frozen=True)
class ToldView:
    """A whole picture, uint8 (3, side, side), and its regions."""

    view: Tensor
    regions: tuple[Region, ...]


class RegionsObjective(TrainsTower, WholeBatchObjective):
    """The second loss of `words`, by itself: the features that a language model looks at name the words of regions."""

    def __init__(self, tower: Tower, tokenizer: PreTrainedTokenizerBase, side: int) -> None:
        """`side`: pixels of a view. Raises ValueError for a tower without patches, or patches that do not divide it."""
        super().__init__()
        if not tower.has_patch_tokens:
            raise ValueError("regions are named by patches, and this tower has none (it is a ResNet): take another one")
        check_side(tower, side)
        self.tower = tower
        self.tokenizer = tokenizer
        self.side = side
        self.names = nn.Linear(tower.width, len(tokenizer))

    def sample(self, picture: Picture, generator: np.random.Generator) -> ToldView:
        """The whole picture, resized. Raises DataError for one in which no region is told."""
        if not picture.regions:
            raise DataError(f"{picture.name} has no regions, and this objective trains on nothing else; leave it out")
        return ToldView(square(picture.pixels, self.side), picture.regions)

    def collate(self, samples: Sequence[ToldView]) -> Mapping[str, Tensor]:
        """views (B, 3, side, side) uint8, and what `regions_of` gives."""
        told = regions_of([sample.regions for sample in samples], self.tower.grid(self.side, self.side), self.tokenizer)
        return {"views": torch.stack([sample.view for sample in samples]), **told}

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """The patches' features (b, N, D), each normalised, beside the regions that they are in."""
        patches = self.tower.features(self.tower.normalise(batch["views"])).float()
        patches = functional.layer_norm(patches, patches.shape[-1:])
        return {"patches": patches, "region_of": batch["region_of"], "region_said": batch["region_said"]}

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss, and the share of patches that name all words of their region and no other."""
        named, said = named_patches(representations["region_of"], representations["region_said"])
        scores = self.names(representations["patches"][named])
        loss = naming_loss(scores, said, torch.ones(scores.shape[-1], device=scores.device))
        return {"regions_loss": loss, "regions_named": share_named(scores.detach(), said)}

    def watched(self, samples: int) -> Watched:
        """The tower by its patches: nothing trains its pooled output."""
        return Watched(self.tower, pooled=False)

    def trained_parameters(self) -> set[str]:
        """The names, and of the tower all that stands before the features; what lies behind them stays as it was."""
        looked_at = len(self.tower.layers_looked_at)
        still = mask_token_names(self.tower)
        inside = {name for name, _ in self.tower.named_parameters() if self.tower.layer_of(name) <= looked_at}
        return {f"tower.{name}" for name in inside - still} | {"names.weight", "names.bias"}


def build(settings: Settings, start: Start) -> RegionsObjective:
    """Naming on the tower of `start`. Raises ValueError when there is none, or no tokenizer to read its words with."""
    if start.tokenizer is None:
        raise ValueError("regions reads words, and no tokenizer was given")
    return RegionsObjective(given_tower(start, "regions"), start.tokenizer, start.side)
