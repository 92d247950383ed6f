"""The contract between the trainer and what it trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn


class Objective(nn.Module):
    """Owns its model, heads and loss; the trainer knows nothing else of it.

    A subclass implements `forward`, `collate`, `trained_parameters` and `export`, and may implement `after_step`.
    """

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Named values of one batch: those that end in `_loss` are summed and minimised, the others are logged."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def collate(self, samples: Sequence[Any]) -> Mapping[str, Any]:
        """One batch, as keyword arguments of `forward`, from samples of the stage's dataset."""
        raise TypeError(f"{type(self).__name__} has no collate")

    def trained_parameters(self) -> set[str]:
        """Names (as in `named_parameters`) of exactly the parameters that move; all others are frozen."""
        raise TypeError(f"{type(self).__name__} does not say what it trains")

    def rate_of(self, name: str) -> float:
        """Share of the schedule's learning rate at which the parameter called `name` moves."""
        return 1.0

    def after_step(self) -> None:
        """Called after each optimiser step: teacher averaging, queues, clamps."""

    def export(self, folder: Path) -> None:
        """Write what the next stage or a user loads, in the published layout."""
        raise TypeError(f"{type(self).__name__} has no export")


def total_loss(values: Mapping[str, Tensor]) -> Tensor:
    """The sum of the values whose names end in `_loss`. Raises ValueError when there is none."""
    losses = [value for name, value in values.items() if name.endswith("_loss")]
    if not losses:
        raise ValueError(f"an objective returned no name that ends in _loss, only {sorted(values)}")
    return sum(losses[1:], start=losses[0])
