"""Choose what a page shows of thousands of answers: the commonest confusions, and pictures without a hand in it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Confusion:
    """Pictures of one label that were given another, at their `places` among the test pictures."""

    expected: int
    given: int
    places: list[int]
    of: int  # how many pictures have the expected label


def confusions(answers: Sequence[int], expected: Sequence[int], count: int) -> list[Confusion]:
    """The `count` pairs of expected and given label that happen most, most first; of equal ones the smaller labels."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, pair in enumerate(zip(expected, answers, strict=True)):
        places[pair].append(place)
    wrong = [(pair, found) for pair, found in places.items() if pair[0] != pair[1]]
    wrong.sort(key=lambda item: (-len(item[1]), item[0]))
    return [Confusion(*pair, found, list(expected).count(pair[0])) for pair, found in wrong[:count]]


def spread(places: Sequence[int], count: int) -> list[int]:
    """`count` of the places (all, where there are fewer), evenly spread from the first to the last."""
    if len(places) <= count:
        return list(places)
    return [places[round(number * (len(places) - 1) / max(1, count - 1))] for number in range(count)]


def surest(places: Sequence[int], shares: Tensor, count: int) -> list[int]:
    """The `count` places whose largest share, in the rows of `shares` (Q, C), is the largest; largest first."""
    return sorted(places, key=lambda place: -float(shares[place].max()))[:count]


def label_shares_right(answers: Sequence[int], expected: Sequence[int], labels: int) -> list[float | None]:
    """The share of each label's pictures that was named right; None for a label without pictures."""
    pictures, right = [0] * labels, [0] * labels
    for answer, true in zip(answers, expected, strict=True):
        pictures[true] += 1
        right[true] += answer == true
    return [hit / number if number else None for hit, number in zip(right, pictures, strict=True)]
