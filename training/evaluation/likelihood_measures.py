"""Scores of what a model holds likely: the likeliest choice, and the perplexity of texts."""

from collections.abc import Iterator, Sequence
from math import log

import numpy as np

from training.evaluation.answer_measures import accuracy_measure
from training.evaluation.predictions import Prediction
from training.evaluation.resampling import Measure, grouped, ratio
from training.evaluation.task_items import Item


def chosen(prediction: Prediction, by_token: bool) -> int:
    """The place of the likeliest choice; `by_token` divides each log-likelihood by the tokens of its choice."""
    assert prediction.likelihoods is not None and prediction.tokens is not None
    pairs = zip(prediction.likelihoods, prediction.tokens, strict=True)
    values = [likelihood / tokens if by_token else likelihood for likelihood, tokens in pairs]
    return values.index(max(values))


def choices_measures(items: Sequence[Item], predictions: Sequence[Prediction]) -> Iterator[Measure]:
    """Accuracy of the choice that is likeliest a token (so that long ones are not at a loss), and of the likeliest."""
    chance = sum(1 / len(item.choices) for item in items) / len(items)
    for name, by_token in (("accuracy, by likelihood a token", True), ("accuracy, by likelihood", False)):
        pairs = zip(items, predictions, strict=True)
        right = np.array([float(item.choices[chosen(one, by_token)] == item.expected[0]) for item, one in pairs])
        yield accuracy_measure(name, items, right, None, chance=chance)


def perplexity_measures(items: Sequence[Item], predictions: Sequence[Prediction]) -> Iterator[Measure]:
    """Perplexity: e to the mean surprise (nats) of a token; and bits a byte, which other tokenizers compare with."""
    counts = np.array(
        [
            [-sum(one.likelihoods or ()), sum(one.tokens or ()), log(2) * len(item.expected[0].encode())]
            for item, one in zip(items, predictions, strict=True)
        ]
    )
    names, sums = grouped([item.group for item in items], counts)
    yield Measure(
        "perplexity of a token", names, sums, lambda s: np.exp(ratio(s)), len(items), "plain", lower_is_better=True
    )
    yield Measure(
        "bits a byte", names, sums, lambda s: ratio(s[..., [0, 2]]), len(items), "plain", lower_is_better=True
    )
