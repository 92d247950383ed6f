"""Probes of frozen features: the nearest neighbours vote, and a linear classifier is trained."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = 20
TEMPERATURE = 0.07
QUERIES_AT_ONCE = 1024
# scikit-learn's C, from strong to weak: the inverse of the penalty on the squared weights, beside the summed loss.
REGULARISATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
HELD_OUT = 0.2  # share of the training pictures that chooses among them
ITERATIONS = 1000
GIVEN_UP = 0.02  # weaker penalties are not tried once one of them was so much worse than the best


def knn_labels(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    neighbours: int = NEIGHBOURS,
    temperature: float | None = TEMPERATURE,
) -> Tensor:
    """The label that the nearest training features vote for; of equal votes the smallest label.

    A neighbour votes with weight exp(cosine / temperature) (Wu et al. 2018, section 3.4; DINO's evaluation takes the
    same 20 neighbours and 0.07), or each with the same weight where `temperature` is None.

    Args:
        train: (B, D) features, of any length.
        train_labels: (B,) int64 from 0.
        test: (Q, D) features.

    Returns:
        (Q,) int64 labels.

    Raises:
        ValueError: more neighbours are asked for than there are training features.
    """
    if not 1 <= neighbours <= len(train):
        raise ValueError(f"{neighbours} neighbours of {len(train)} training features: ask for 1 to {len(train)}")
    similarity, index = nearest(train, test, neighbours)
    # Only ratios of weights matter; the largest exponent is 0, so that no temperature overflows.
    shifted = similarity - similarity[:, :1]
    weights = torch.ones_like(shifted) if temperature is None else (shifted / temperature).exp()
    votes = weights.new_zeros(len(test), int(train_labels.max()) + 1)
    return votes.scatter_add_(1, train_labels[index], weights).argmax(-1)


def nearest(train: Tensor, test: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Cosines (Q, neighbours), largest first, and which of the (B, D) training features they are of, for (Q, D)."""
    train = functional.normalize(train.float(), dim=-1)
    parts = functional.normalize(test.float(), dim=-1).split(QUERIES_AT_ONCE)
    found = [(queries @ train.T).topk(neighbours, dim=-1) for queries in parts]
    return torch.cat([similarity for similarity, _ in found]), torch.cat([index for _, index in found])


@dataclass(frozen=True)
class LinearProbe:
    """What a trained linear classifier says of the test features, and how it was trained."""

    labels: Tensor  # (Q,) int64
    regularisation: float  # the chosen C
    held_out_accuracy: float  # of that C, on the part of the training features that chose it
    converged: bool


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, seed: int = 0) -> LinearProbe:
    """Multinomial logistic regression by L-BFGS on standardised features.

    The penalty is chosen on a fifth of the training features, with every label in both parts; then all of them train.
    They are tried from strong to weak until one does clearly worse; of those that do equally well the strongest is
    taken. The test features choose nothing.

    Args:
        train: (B, D) features.
        train_labels: (B,) int64, two labels or more and each on two features or more.
        test: (Q, D) features.

    Raises:
        ValueError: a label has fewer than two features, or there is one label only.
    """
    counts = train_labels.unique(return_counts=True)[1]
    if len(counts) < 2 or int(counts.min()) < 2:
        raise ValueError("a linear probe needs two labels or more, and each on two training pictures or more")
    features, labels = train.float().cpu().numpy(), train_labels.cpu().numpy()
    held_out = max(len(counts), round(HELD_OUT * len(labels)))
    part, rest, part_labels, rest_labels = train_test_split(
        features, labels, test_size=held_out, stratify=labels, random_state=seed
    )
    # From strong to weak, each from where the one before it ended: an optimum is found in a fraction of the iterations.
    classifier = LogisticRegression(max_iter=ITERATIONS, warm_start=True)
    scaler, best, accuracy, start = StandardScaler().fit(part), 0.0, -1.0, (np.empty(0), np.empty(0))
    for regularisation in REGULARISATIONS:
        fit(classifier, scaler.transform(part), part_labels, regularisation)
        right = float(classifier.score(scaler.transform(rest), rest_labels))
        if right > accuracy:
            best, accuracy, start = regularisation, right, (classifier.coef_.copy(), classifier.intercept_.copy())
        if right < accuracy - GIVEN_UP:
            break
    classifier.coef_, classifier.intercept_ = start
    scaler = StandardScaler().fit(features)
    converged = fit(classifier, scaler.transform(features), labels, best)
    predicted = classifier.predict(scaler.transform(test.float().cpu().numpy()))
    return LinearProbe(torch.from_numpy(predicted), best, accuracy, converged)


def fit(classifier: LogisticRegression, features: np.ndarray, labels: np.ndarray, regularisation: float) -> bool:
    """Fit `classifier` to (B, D) features and (B,) labels with that C; whether it came to the optimum."""
    classifier.C = regularisation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said in the result instead
        classifier.fit(features, labels)
    return int(classifier.n_iter_.max()) < ITERATIONS
