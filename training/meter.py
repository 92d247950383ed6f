"""Add up what happens between two lines of a log: the mean of each value, and how fast the run trains."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from training.gather import ranks

Unit = Literal["samples", "tokens"]


class Meter:
    """Values and amounts since the last line; its clock stands while nothing trains."""

    def __init__(self) -> None:
        self._stood = 0.0  # seconds
        self._since: float | None = None  # when the last line was written
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, float] = {}
        self._count, self._amount = 0, 0
        self._unit: Unit = "samples"

    def _now(self) -> float:
        return time.monotonic() - self._stood

    @contextmanager
    def standing(self) -> Iterator[None]:
        """What happens meanwhile takes no time."""
        began = time.monotonic()
        yield
        self._stood += time.monotonic() - began

    def note(self, values: Mapping[str, float]) -> None:
        """Take in what one micro-batch returned."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def trained_on(self, amount: int, unit: Unit) -> None:
        """Take in how much this rank trained on."""
        self._amount += amount
        self._unit = unit

    def line(self) -> dict[str, float]:
        """The means since the last line, and samples or tokens a second over all ranks; none before the first line."""
        said = {name: round(value / self._count, 5) for name, value in self._sums.items()}
        if self._since is not None and self._now() > self._since:
            said[f"{self._unit}_per_second"] = round(self._amount * ranks() / (self._now() - self._since), 2)
        self._since = self._now()
        self._begin()
        return said
