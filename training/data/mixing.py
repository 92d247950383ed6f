"""Decide, once and reproducibly, which sample of which source stands at each place of a run."""

from collections.abc import Sequence

import numpy as np


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
    share = np.asarray(weights, dtype=np.float64)
    if (share < 0).any() or share.sum() <= 0:
        raise ValueError(f"mixture weights must not be negative and not all zero, got {list(weights)}")
    empty = [number for number, size in enumerate(sizes) if size == 0 and share[number] > 0]
    if empty:
        raise ValueError(f"source number {empty[0]} of the mixture is empty")
    generator = np.random.default_rng([seed, 0])
    source = generator.choice(len(sizes), size=total, p=share / share.sum())
    index = np.zeros(total, dtype=np.int64)
    for number, size in enumerate(sizes):
        places = np.flatnonzero(source == number)
        if len(places):
            index[places] = _rounds(size, len(places), np.random.default_rng([seed, 1, number]))
    return source, index


def _rounds(size: int, count: int, generator: np.random.Generator) -> np.ndarray:
    rounds = [generator.permutation(size) for _ in range(-(-count // size))]
    return np.concatenate(rounds)[:count]
