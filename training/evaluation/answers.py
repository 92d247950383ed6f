"""Says whether short answers are right: exactly the expected one, up to how it is written."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SPELLINGS = {"gray": "grey", "none": "0"} | {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Accuracy:
    """Shares from 0 to 1. `majority` is what always giving the commonest answer would reach."""

    right: float
    majority: float
    questions: int


def normalised(answer: str) -> str:
    """Lower case without punctuation and articles; numbers up to ten in digits, one spelling of grey."""
    words = re.findall(r"\w+", answer.lower())
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(given: Sequence[str], expected: Sequence[str]) -> Accuracy:
    """Share of answers that equal the expected one. Raises ValueError when there are none or unequally many."""
    if not expected or len(given) != len(expected):
        raise ValueError(f"{len(given)} answers to {len(expected)} questions: one each, and at least one, is needed")
    truths = [normalised(answer) for answer in expected]
    right = sum(normalised(answer) == truth for answer, truth in zip(given, truths, strict=True))
    return Accuracy(right / len(truths), Counter(truths).most_common(1)[0][1] / len(truths), len(truths))


def accuracy_by_kind(kinds: Iterable[str], given: Sequence[str], expected: Sequence[str]) -> dict[str, Accuracy]:
    """The accuracy over the questions of each kind, in alphabetical order."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for kind, answer, truth in zip(kinds, given, expected, strict=True):
        answers, truths = groups.setdefault(kind, ([], []))
        answers.append(answer)
        truths.append(truth)
    return {kind: accuracy(*groups[kind]) for kind in sorted(groups)}
