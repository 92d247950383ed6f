"""Carry the names of samples through the loader, so that a step that goes wrong can say which they were."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.data.pictures import Picture

NAMES = "sample_names"  # the key of a batch under which they come


@dataclass(frozen=True)
class NamedSample:
    """What an objective made of one picture, and the picture's name."""

    name: str
    sample: Any


@dataclass(frozen=True)
class NamesSamples:
    """Makes samples of pictures as `make` does and keeps the pictures' names."""

    make: Callable[[Picture, np.random.Generator], Any]

    def __call__(self, picture: Picture, generator: np.random.Generator) -> NamedSample:
        """The sample of `picture` with its name."""
        return NamedSample(picture.name, self.make(picture, generator))


@dataclass(frozen=True)
class CollatesNames:
    """Collates bare samples as `collate` does; their names come along in the batch."""

    collate: Callable[[Sequence[Any]], Mapping[str, Any]]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The batch and, under NAMES, a list of names: a sample without one is called by its place in the batch."""
        names = [_name_of(sample) or f"number {place + 1} of the batch" for place, sample in enumerate(samples)]
        bare = [sample.sample if isinstance(sample, NamedSample) else sample for sample in samples]
        return {**self.collate(bare), NAMES: names}


def _name_of(sample: Any) -> str | None:
    name = getattr(sample, "name", None)
    return name if isinstance(name, str) else None
