"""Decide, once and reproducibly, which sample of which source stands at each place of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Phase:
    """From the share `start` of a run on, until the next phase, sources have these shares of the samples."""

    start: float
    weights: tuple[float, ...]


def mixture_plan(
    sizes: Sequence[int], weights: Sequence[float], total: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Source and index for each of `total` places: int arrays of length `total`.

    Sources are drawn by `weights`; inside one source every sample comes once before any comes twice, in a new order
    each round. The plan depends on its arguments alone, so that a resumed run sees what the uninterrupted one saw.
    Raises ValueError when a source with weight is empty or no weight is positive.
    """
    if len(sizes) != len(weights) or not sizes:
        raise ValueError(f"{len(sizes)} sources but {len(weights)} weights")
    share = _shares(sizes, weights)
    generator = np.random.default_rng([seed, 0])
    source = generator.choice(len(sizes), size=total, p=share)
    return source, _indices(sizes, source, seed)


def phased_plan(sizes: Sequence[int], phases: Sequence[Phase], total: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `mixture_plan`, with weights that change on the way, and with exact shares.

    In each phase each source has its share of the places to less than one place (largest remainders), spread by
    chance. Samples go on from phase to phase: none comes twice before every one of its source came once. Raises
    ValueError when the first phase does not start at 0, or starts do not rise, and where `mixture_plan` does.
    """
    starts = [phase.start for phase in phases]
    rising = all(start < later for start, later in pairwise(starts))
    if not phases or starts[0] != 0 or not rising or starts[-1] >= 1:
        raise ValueError(f"phases start at 0 and later ones at rising shares of the run below 1, not at {starts}")
    edges = [round(start * total) for start in starts] + [total]
    source = np.zeros(total, dtype=np.int64)
    for number, phase in enumerate(phases):
        if len(phase.weights) != len(sizes):
            raise ValueError(f"{len(sizes)} sources but {len(phase.weights)} weights in the phase from {phase.start}")
        places = edges[number + 1] - edges[number]
        counts = apportioned(_shares(sizes, phase.weights), places)
        in_order = np.repeat(np.arange(len(sizes)), counts)
        source[edges[number] : edges[number + 1]] = np.random.default_rng([seed, 3, number]).permutation(in_order)
    return source, _indices(sizes, source, seed)


def with_replay(phases: Sequence[Phase], replayed: Sequence[float], share: float) -> list[Phase]:
    """`phases` with further sources behind theirs, which have `share` of the samples at every time.

    Among themselves they are drawn by the weights `replayed`: what a model knew is kept up while it learns what is
    new, whatever the weights of that are.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share that is replayed is at least 0 and below 1, not {share}")
    old = np.asarray(replayed) / sum(replayed) * share
    return [
        Phase(phase.start, (*(np.asarray(phase.weights) / sum(phase.weights) * (1 - share)), *old)) for phase in phases
    ]


def apportioned(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total` and follow `shares` (which sum to 1) to less than one: largest remainders."""
    exact = shares * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def _shares(sizes: Sequence[int], weights: Sequence[float]) -> np.ndarray:
    share = np.asarray(weights, dtype=np.float64)
    if (share < 0).any() or share.sum() <= 0:
        raise ValueError(f"mixture weights must not be negative and not all zero, got {list(weights)}")
    empty = [number for number, size in enumerate(sizes) if size == 0 and share[number] > 0]
    if empty:
        raise ValueError(f"source number {empty[0]} of the mixture is empty")
    return share / share.sum()


def _indices(sizes: Sequence[int], source: np.ndarray, seed: int) -> np.ndarray:
    """The sample at each place, given its source: every sample of a source once before any twice."""
    index = np.zeros(len(source), dtype=np.int64)
    for number, size in enumerate(sizes):
        places = np.flatnonzero(source == number)
        if len(places):
            index[places] = _rounds(size, len(places), np.random.default_rng([seed, 1, number]))
    return index


def _rounds(size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    rounds = [generator.permutation(size) for _ in range(-(-count // size))]
    return np.concatenate(rounds)[:count]
