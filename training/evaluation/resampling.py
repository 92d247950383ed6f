"""Intervals of scores and the significance of differences, by drawing anew what belongs together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

import numpy as np

from training.evaluation.scores import wilson_interval

DRAWS = 2_000  # of the bootstrap
SWAPS = 9_999  # of the permutation test; the smallest p is one in ten thousand
AT_ONCE = 2**22  # numbers that are drawn at once
LOW, HIGH = 2.5, 97.5  # percentiles of the 95 % interval

Unit = Literal["share", "points", "plain"]
Value = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Measure:
    """A score that is a function of sums over G groups of items; a group is drawn or left out as one.

    Questions about one picture are right or wrong together, so intervals that took them for independent would be too
    narrow.
    """

    name: str
    groups: tuple[str, ...]  # G names
    counts: np.ndarray  # (G, S) float64: what is added up
    value: Value  # (..., S) -> (...)
    items: int
    unit: Unit = "share"  # a share from 0 to 1, points as in papers, or a number of its own kind
    part: str | None = None  # the kind of question, where the score is of these alone
    is_count: bool = False  # whether the score is right answers (first column) of answers (second)
    chance: float | None = None
    majority: float | None = None
    lower_is_better: bool = False


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval; nan where nothing says it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The first score less the second on the same items; `p` says how often chance alone gives one as large."""

    value: float
    low: float
    high: float
    p: float
    test: Literal["McNemar, exact", "paired permutation"]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second, nan where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def interval_of(measure: Measure, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The 95 % interval of a score.

    Shares of right answers: Wilson's interval at the effective number of answers, p (1 - p) over the variance between
    groups (Korn and Graubard 1998); with one answer a group it is Wilson's own. All others: the percentiles of
    `draws` bootstrap draws of groups (Efron 1979).
    """
    value = float(measure.value(measure.counts.sum(0)))
    if measure.is_count:
        return Interval(value, *wilson_interval(value, _effective(measure.counts[:, 0], measure.counts[:, 1])))
    drawn = np.concatenate([measure.value(weights @ measure.counts) for weights in _draws(measure.counts, draws, seed)])
    return Interval(value, *_percentiles(drawn))


def _effective(right: np.ndarray, answers: np.ndarray) -> float:
    """How many independent answers would tell as much as these."""
    share = right.sum() / answers.sum()
    if share in (0, 1):
        return float((answers > 0).sum())
    variance = float(((right - share * answers) ** 2).sum() / answers.sum() ** 2)
    return min(float(answers.sum()), float(share * (1 - share)) / variance) if variance else float(answers.sum())


def _draws(counts: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of G groups is in each draw, (some, G) at a time."""
    generator, groups = np.random.default_rng(seed), len(counts)
    step = max(1, AT_ONCE // groups)
    for start in range(0, draws, step):
        yield generator.multinomial(groups, np.full(groups, 1 / groups), size=min(step, draws - start)).astype(float)


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(drawn, (LOW, HIGH))
    return float(low), float(high)


def difference_of(first: Measure, second: Measure, draws: int = DRAWS, swaps: int = SWAPS, seed: int = 0) -> Difference:
    """Whether two models differ on the same items.

    Where every group is one answer, right or wrong, McNemar's exact test (1947; binomial on those that one alone has
    right). Else the paired permutation test: the two models' answers to each group change places by the toss of a
    coin, `swaps` times. The interval is that of the paired bootstrap.

    Raises ValueError where the groups are not the same.
    """
    if first.groups != second.groups:
        raise ValueError(f"{first.name}: the two scores are not of the same items")
    one, other = first.counts, second.counts
    value = float(first.value(one.sum(0)) - second.value(other.sum(0)))
    drawn = np.concatenate([first.value(w @ one) - second.value(w @ other) for w in _draws(one, draws, seed)])
    low, high = _percentiles(drawn)
    if first.is_count and (one[:, 1] == 1).all():
        gained, lost = int((one[:, 0] > other[:, 0]).sum()), int((one[:, 0] < other[:, 0]).sum())
        return Difference(value, low, high, mcnemar(gained, lost), "McNemar, exact")
    return Difference(value, low, high, _permuted(first, second, value, swaps, seed), "paired permutation")


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p of a fair coin that falls `gained` times on one side and `lost` times on the other, or worse."""
    both = gained + lost
    tail = sum(comb(both, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**both)


def _permuted(first: Measure, second: Measure, value: float, swaps: int, seed: int) -> float:
    if np.isnan(value):
        return float("nan")
    generator = np.random.default_rng(seed)
    change = second.counts - first.counts
    mine, theirs, as_large = first.counts.sum(0), second.counts.sum(0), 0
    step = max(1, AT_ONCE // len(change))
    for start in range(0, swaps, step):
        moved = generator.integers(0, 2, (min(step, swaps - start), len(change))) @ change
        swapped = np.abs(first.value(mine + moved) - second.value(theirs - moved))
        as_large += int((swapped >= abs(value) * (1 - 1e-12) - 1e-12).sum())
    return (as_large + 1) / (swaps + 1)


def grouped(groups: Sequence[str], counts: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and sums (G, S) of the groups that items (N, S) belong to, in the order of their first item."""
    names = list(dict.fromkeys(groups))
    place = {name: number for number, name in enumerate(names)}
    sums = np.zeros((len(names), counts.shape[1]))
    np.add.at(sums, [place[name] for name in groups], counts)
    return tuple(names), sums
