"""Scores of answers in words: the very answer, VQA accuracy, yes or no, true or false."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from training.evaluation.answers import normalised
from training.evaluation.resampling import Measure, Unit, Value, grouped, ratio
from training.evaluation.task_items import Item
from training.evaluation.verdicts import VERDICTS, verdict_of
from training.evaluation.vqa import vqa_accuracy

# Columns of what is counted for yes or no.
RIGHT, ANSWERS, TRUE_POSITIVE, SAID_YES, IS_YES, NEITHER = range(6)


def right_words(items: Sequence[Item], answers: Sequence[str]) -> np.ndarray:
    """For each item 1 where its answer is one of those expected, up to how it is written, else 0; float64 (N,)."""
    pairs = zip(items, answers, strict=True)
    return np.array([float(normalised(said) in {normalised(one) for one in item.expected}) for item, said in pairs])


def right_verdicts(items: Sequence[Item], answers: Sequence[str], kind: str) -> np.ndarray:
    """For each item 1 where the answer's verdict is the expected one, else 0; float64 (N,)."""
    pairs = zip(items, answers, strict=True)
    return np.array([float(verdict_of(said, kind) == item.expected[0]) for item, said in pairs])


def words_measures(items: Sequence[Item], answers: Sequence[str]) -> Iterator[Measure]:
    """Accuracy of all items and of each kind of question, beside the commonest answer's."""
    right = right_words(items, answers)
    yield accuracy_measure("accuracy", items, right, majority_of(items))
    kinds = sorted({item.kind for item in items if item.kind is not None})
    for kind in kinds if len(kinds) > 1 else []:
        places = [place for place, item in enumerate(items) if item.kind == kind]
        some = [items[place] for place in places]
        yield accuracy_measure("accuracy", some, right[places], majority_of(some), part=kind)


def vqa_measures(items: Sequence[Item], answers: Sequence[str]) -> Iterator[Measure]:
    """VQA v2's accuracy, the mean over questions."""
    shares = np.array([vqa_accuracy(said, item.expected) for item, said in zip(items, answers, strict=True)])
    yield mean_measure("VQA accuracy", items, shares)


def yes_no_measures(items: Sequence[Item], answers: Sequence[str]) -> Iterator[Measure]:
    """POPE's five (Li et al. 2023): accuracy, and precision, recall, F1 of yes, and the rate of yes; and of neither."""
    said = [verdict_of(answer, "yes_no") for answer in answers]
    true = [item.expected[0] for item in items]
    counts = np.zeros((len(items), 6))
    for place, (one, other) in enumerate(zip(said, true, strict=True)):
        yes = one == "yes"
        counts[place] = one == other, 1, yes and other == "yes", yes, other == "yes", one is None
    yield accuracy_measure("accuracy", items, counts[:, RIGHT], majority_of(items), chance=0.5)
    names, sums = grouped([item.group for item in items], counts)

    def of(name: str, value: Value) -> Measure:
        return Measure(name, names, sums, value, len(items))

    yield of("precision of yes", lambda s: ratio(s[..., [TRUE_POSITIVE, SAID_YES]]))
    yield of("recall of yes", lambda s: ratio(s[..., [TRUE_POSITIVE, IS_YES]]))
    yield of("F1 of yes", lambda s: ratio(np.stack([2 * s[..., TRUE_POSITIVE], s[..., SAID_YES] + s[..., IS_YES]], -1)))
    yield of("rate of yes", lambda s: ratio(s[..., [SAID_YES, ANSWERS]]))
    yield of("neither yes nor no", lambda s: ratio(s[..., [NEITHER, ANSWERS]]))


def true_false_measures(items: Sequence[Item], answers: Sequence[str]) -> Iterator[Measure]:
    """Accuracy, and NLVR's consistency: statements that are judged rightly of every picture (Suhr et al. 2019)."""
    right = right_verdicts(items, answers, "true_false")
    yield accuracy_measure("accuracy", items, right, majority_of(items), chance=0.5)
    names, sums = grouped([item.group for item in items], np.stack([right, np.ones(len(items))], -1))
    consistent = np.stack([sums[:, 0] == sums[:, 1], np.ones(len(names))], -1).astype(float)
    yield Measure("consistency", names, consistent, ratio, len(items), is_count=True)
    neither = np.array([float(verdict_of(answer, "true_false") is None) for answer in answers])
    yield mean_measure("neither true nor false", items, neither)


def accuracy_measure(
    name: str, items: Sequence[Item], right: np.ndarray, majority: float | None, **more: Any
) -> Measure:
    """The share of right answers, `right` (N,) being 1 or 0."""
    names, sums = grouped([item.group for item in items], np.stack([right, np.ones(len(items))], -1))
    return Measure(name, names, sums, ratio, len(items), is_count=True, majority=majority, **more)


def mean_measure(name: str, items: Sequence[Item], values: np.ndarray, unit: Unit = "share") -> Measure:
    """The mean of `values` (N,), one for each item."""
    names, sums = grouped([item.group for item in items], np.stack([values, np.ones(len(items))], -1))
    return Measure(name, names, sums, ratio, len(items), unit=unit)


def majority_of(items: Sequence[Item]) -> float:
    """What always giving the commonest expected answer would reach."""
    verdicts = {word for words in VERDICTS.values() for word in words.values()}
    expected = [{one if one in verdicts else normalised(one) for one in item.expected} for item in items]
    counts = Counter(answer for those in expected for answer in those)
    return counts.most_common(1)[0][1] / len(items)
