"""The linear probe of a few pictures a label, drawn several times: how much must a tower be shown?"""

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from training.evaluation.probes import ITERATIONS, fit
from training.evaluation.scores import DRAWS

# One penalty for every number of shots, for one picture a label leaves none to choose it by. On features of unit length
# scikit-learn's C of 1 is the rule of Tian et al. 2020 ("Rethinking Few-Shot Image Classification", section 3.1).
REGULARISATION = 1.0


def draw_shots(train_labels: Tensor, shots: int, draw: int) -> Tensor:
    """(labels x shots,) int64: which of the training pictures are shown, `shots` of each label, in rising order.

    The same draw with fewer shots shows some of the same pictures, so that a curve over shots is of growing sets.

    Raises:
        ValueError: a label has fewer pictures than `shots`.
    """
    labels = train_labels.cpu().numpy()
    chosen = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if not 1 <= shots <= len(places):
            raise ValueError(f"{shots} shots of label {label}, which has {len(places)} pictures")
        chosen.append(np.random.default_rng([draw, int(label)]).permutation(places)[:shots])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


@dataclass(frozen=True)
class FewShotProbe:
    """What linear classifiers say of the test features, each of which learned from a draw of its own."""

    labels: Tensor  # (draws, Q) int64
    converged: bool  # all of them


def few_shot_probe(train: Tensor, train_labels: Tensor, test: Tensor, shots: int, draws: int = DRAWS) -> FewShotProbe:
    """Multinomial logistic regression on features of unit length, from `shots` pictures of each label.

    The penalty is `REGULARISATION`; see there.

    Args:
        train: (B, D) features.
        train_labels: (B,) int64, two labels or more.
        test: (Q, D) features.

    Raises:
        ValueError: there is one label only, or a label has fewer pictures than `shots`.
    """
    unit, queries = (functional.normalize(features.float().cpu(), dim=-1) for features in (train, test))
    said, converged = [], True
    for draw in range(draws):
        shown = draw_shots(train_labels, shots, draw)
        classifier = LogisticRegression(max_iter=ITERATIONS)
        converged &= fit(classifier, unit[shown].numpy(), train_labels[shown].numpy(), REGULARISATION)
        said.append(torch.from_numpy(classifier.predict(queries.numpy())))
    return FewShotProbe(torch.stack(said), converged)
