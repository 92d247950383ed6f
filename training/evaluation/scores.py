"""What a share of right answers says: the share, its 95 % interval, and what knowing nothing would reach."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import fmean, stdev

Z = 1.959963984540054  # a standard normal lies within plus and minus this with probability 0.95
DRAWS = 5  # of what is drawn at random and measured again
STUDENT = 2.7764451051977987  # what Z is to a mean of DRAWS numbers, with their own deviation (Student's t, 4 degrees)


@dataclass(frozen=True)
class Score:
    """Shares from 0 to 1. `chance` is guessing evenly; `majority` is the best constant answer (None: there is none)."""

    right: float
    low: float
    high: float
    chance: float
    majority: float | None
    pictures: int


def score_of(right: float, pictures: int, chance: float, majority: float | None = None) -> Score:
    """The score of a share `right` that was measured on so many pictures."""
    low, high = wilson_interval(right, pictures)
    return Score(right, low, high, chance, majority, pictures)


def score_labels(given: Sequence[Hashable], expected: Sequence[Hashable], labels: int) -> Score:
    """How often the given label is the expected one, with `labels` of them to choose from.

    Raises ValueError when there are none or unequally many.
    """
    if not expected or len(given) != len(expected):
        raise ValueError(f"{len(given)} labels for {len(expected)} pictures: one each, and at least one, is needed")
    right = sum(one == other for one, other in zip(given, expected, strict=True)) / len(expected)
    majority = Counter(expected).most_common(1)[0][1] / len(expected)
    return score_of(right, len(expected), 1 / labels, majority)


def score_draws(given: Sequence[Sequence[Hashable]], expected: Sequence[Hashable], labels: int) -> Score:
    """The mean score of `DRAWS` classifiers on the same pictures, each of which learned from what was drawn for it.

    Its interval is of other pictures and of other draws: half widths of Wilson's interval and of Student's add up as
    independent deviations do, by their squares. Raises ValueError for another number of draws.
    """
    if len(given) != DRAWS:
        raise ValueError(f"{len(given)} draws, where the interval is that of {DRAWS}")
    scores = [score_labels(one, expected, labels) for one in given]
    right = fmean(score.right for score in scores)
    of_draws = STUDENT * stdev(score.right for score in scores) / sqrt(DRAWS)
    low, high = wilson_interval(right, len(expected))
    low, high = right - hypot(right - low, of_draws), right + hypot(high - right, of_draws)
    return Score(right, max(0.0, low), min(1.0, high), 1 / labels, scores[0].majority, len(expected))


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share measured on `count` independent trials (Wilson 1927); sound at 0 and 1 too."""
    if count < 1:
        raise ValueError("a share of nothing has no interval: at least one trial is needed")
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
