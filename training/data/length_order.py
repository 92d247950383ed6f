"""Put samples of like length into one micro-batch, without changing which samples a step sees."""

from functools import lru_cache
from typing import Protocol, TypeVar

from torch.utils.data import Dataset

from training.data.samples import Mixture

CHARACTERS_OF_A_TOKEN = 4  # roughly; only the order hangs on it

Sample = TypeVar("Sample", covariant=True)


class Extended(Protocol):
    """A source that can say how long a sample is without making it."""

    def extent(self, index: int) -> tuple[int, int]:
        """Pictures and characters of sample `index`, roughly."""
        ...


class LongestFirst(Dataset[Sample]):
    """The samples of `mixture`, those of each step from the longest to the shortest.

    A micro-batch is padded to its longest sample, so alike ones waste the least, and memory that does not suffice shows
    at once. A step sees the samples that it would see anyway, and its loss is the mean over all their supervised
    tokens: nothing but the order of sums changes. Ranks get neighbours, so they wait little for each other.
    """

    def __init__(self, mixture: Mixture[Sample], step: int, per_picture: int) -> None:
        """`step` samples of all ranks and micro-batches together; `per_picture` tokens of a picture at most."""
        self.mixture, self.step, self.per_picture = mixture, step, per_picture
        self._order = lru_cache(maxsize=2)(self._order_of)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, place: int) -> Sample:
        """The sample at `place` of the new order."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        first = place // self.step * self.step
        return self.mixture[self._order(first)[place - first]]

    def _order_of(self, first: int) -> list[int]:
        """Places of the step that begins at `first`, the longest sample's first."""
        places = range(first, min(first + self.step, len(self)))
        return sorted(places, key=self._tokens, reverse=True)

    def _tokens(self, place: int) -> float:
        source: Extended = self.mixture.sources[self.mixture.source_of[place]]
        pictures, characters = source.extent(int(self.mixture.index_of[place]))
        return pictures * self.per_picture + characters / CHARACTERS_OF_A_TOKEN
