"""The contract between the trainer and what it trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import BaseImageProcessor, CLIPModel, PreTrainedModel, PreTrainedTokenizerBase, SiglipModel

from assistant.towers import Tower
from training.data.pictures import Picture


@dataclass(frozen=True)
class Start:
    """What an objective is built on: a tower alone, or a model with a picture and a text half."""

    side: int  # pixels of a view
    tower: Tower | None = None
    model: CLIPModel | SiglipModel | None = None
    image_processor: BaseImageProcessor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Watched:
    """What an objective shows to those who watch its run."""

    tower: Tower | None = None  # the one that `export` writes
    pooled: bool = True  # its pooled output is trained; else only its patches are, whose mean stands for the picture
    model: CLIPModel | SiglipModel | None = None  # both halves, where texts are read too
    tokenizer: PreTrainedTokenizerBase | None = None
    # By name in `forward`: what a loss is for one who cannot tell the samples of a step apart.
    untaught: Mapping[str, float] = field(default_factory=dict)
    finds: Sequence[str] = ()  # names in `forward` of the shares of samples that find their own among all
    # By name in `forward`: where a value is held back when it would grow further.
    largest: Mapping[str, float] = field(default_factory=dict)


class Objective(nn.Module):
    """Owns its tower, heads, teacher and loss; the trainer knows nothing else of it.

    A subclass implements `sample`, `collate`, `forward`, `trained_parameters` and `export`. The other methods have
    defaults.
    """

    def sample(self, picture: Picture, generator: np.random.Generator) -> Any:
        """The views of `picture` that one place of the run trains on; all chance comes from `generator`."""
        raise TypeError(f"{type(self).__name__} has no sample")

    def collate(self, samples: Sequence[Any]) -> Mapping[str, Any]:
        """One batch, as keyword arguments of `forward`, from samples of the stage's dataset."""
        raise TypeError(f"{type(self).__name__} has no collate")

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Named values of one batch: those that end in `_loss` are summed and minimised, the others are logged."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def trained_parameters(self) -> set[str]:
        """Names (as in `named_parameters`) of exactly the parameters that move; all others are frozen."""
        raise TypeError(f"{type(self).__name__} does not say what it trains")

    def export(self, folder: Path) -> None:
        """Write what the next stage or a user loads, in the published layout."""
        raise TypeError(f"{type(self).__name__} has no export")

    def watched(self, samples: int) -> Watched:
        """What to look at while it trains with `samples` a step, over all processes; nothing where not said."""
        return Watched()

    def tokens_of(self, batch: Mapping[str, Any]) -> int | None:
        """How many tokens of text a batch trains on; None where samples are what counts."""
        return None

    def begin_step(self, step: int, steps: int) -> None:
        """Called before optimiser step `step` (from 0) of `steps`: temperatures, what is frozen at first."""

    def before_update(self, step: int, steps: int) -> None:
        """Called when all gradients of step `step` are there: clear those of what is frozen."""

    def after_step(self, step: int, steps: int) -> None:
        """Called after optimiser step `step` (from 0) of `steps`: teacher averaging, centres, clamps."""

    def rate_of(self, name: str) -> float:
        """Share of the schedule's learning rate at which the parameter called `name` moves."""
        return 1.0

    def layers_above(self, name: str) -> int:
        """How many layers of the tower lie above the parameter called `name`: layer-wise decay counts them."""
        return 0

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Keep the layers' inputs only and compute the rest again going back, in every model that trains."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and any(p.requires_grad for p in module.parameters()):
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs)


class WholeBatchObjective(Objective):
    """An objective whose loss compares the samples of the whole step, over micro-batches and ranks, with each other.

    The trainer accumulates it with cached representations (GradCache, Gao et al. 2021): it calls `represent` on each
    micro-batch without gradient, `compare` once, and `represent` again to carry the gradient on. So `represent`
    depends on its batch and the random state alone, and every tensor it returns has the samples first.
    """

    def represent(self, **batch: Any) -> dict[str, Tensor]:
        """What `compare` needs of a micro-batch of b samples: tensors (b, ...), a teacher's among them."""
        raise TypeError(f"{type(self).__name__} has no represent")

    def compare(self, representations: dict[str, Tensor]) -> dict[str, Tensor]:
        """The named values of `forward`, from all representations of a step."""
        raise TypeError(f"{type(self).__name__} has no compare")

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """`compare` of `represent`; or one half alone, when the trainer asks for it through a wrapper.

        With `representations` it compares them; with `only_represent` it returns the representations.
        """
        if "representations" in batch:
            return self.compare(batch["representations"])
        only_represent = batch.pop("only_represent", False)
        representations = self.represent(**batch)
        return representations if only_represent else self.compare(representations)


class TrainsTower:
    """What objectives share that train `self.tower` alone; stands before `Objective` among the bases."""

    tower: Tower

    def layers_above(self, name: str) -> int:
        """Layers of the tower above a parameter of the tower; 0 in heads, decoders and teachers."""
        part, _, inner = name.partition(".")
        return len(self.tower.layers) + 1 - self.tower.layer_of(inner) if part == "tower" else 0

    def watched(self, samples: int) -> Watched:
        """The tower."""
        return Watched(self.tower)

    def export(self, folder: Path) -> None:
        """The trained tower alone, a plain transformers checkpoint: what stood on it has done its work."""
        self.tower.save(folder)


def given_tower(start: Start, objective: str) -> Tower:
    """The tower of `start`. Raises ValueError when there is none."""
    if start.tower is None:
        raise ValueError(
            f"{objective} trains a tower alone, and none was given: name one with `tower:` or `start_from:`"
        )
    return start.tower


def check_side(tower: Tower, side: int, field: str = "side") -> None:
    """Raises ValueError naming `field` when the patches of `tower` do not divide views of `side` pixels."""
    patch = tower.patch_size
    if tower.has_patch_tokens and side % patch:
        raise ValueError(
            f"{field}: a view of {side} pixels does not divide into patches of {patch}: "
            f"take a multiple, such as {field}: {max(1, round(side / patch)) * patch}"
        )


def mask_token_names(tower: Tower) -> set[str]:
    """The tower's own mask token by its name, when it has one."""
    own = tower.own_mask_token()
    return {name for name, weight in tower.named_parameters() if weight is own}


def total_loss(values: Mapping[str, Tensor]) -> Tensor:
    """The sum of the values whose names end in `_loss`. Raises ValueError when there is none."""
    losses = [value for name, value in values.items() if name.endswith("_loss")]
    if not losses:
        raise ValueError(f"an objective returned no name that ends in _loss, only {sorted(values)}")
    return sum(losses[1:], start=losses[0])
