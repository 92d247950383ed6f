"""Measures of features that need no labels: how many dimensions they use, how they spread, how far they moved."""

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST = 1e-7  # added to each share, as RankMe does, so that the logarithm of none is finite


def rank_me(features: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values' shares (Garrido et al. 2023, equations 1 and 2).

    Between 1 (all features on one line through the origin) and the smaller of B and D (no direction weighs more than
    another); 1 too where all features are zero. `features` are (B, D), as they are: neither centred nor brought to unit
    length. fp64 inside.
    """
    values = torch.linalg.svdvals(features.double())
    if float(values.sum()) == 0:
        return 1.0
    shares = values / values.sum() + SMALLEST
    return float(torch.exp(-(shares * shares.log()).sum()))


def alignment(first: Tensor, second: Tensor, alpha: float = 2.0) -> float:
    """The mean distance, to the power of `alpha`, of (B, D) unit-length features that belong together, row by row.

    Wang & Isola 2020, equation 1, with their default alpha 2: 0 where all pairs are equal, 2 where they are at random.
    """
    return float((first.double() - second.double()).norm(dim=-1).pow(alpha).mean())


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """The log of the mean of exp(-t x squared distance) over all pairs of rows of (B, D) unit-length features.

    Wang & Isola 2020, equation 2, with their default t 2: 0 where all features are the same, about -2 t + 2 t^2 / D
    where they lie at random in D dimensions. Lower is more even. Raises ValueError for fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError("uniformity is of pairs of features, and there are fewer than two")
    return float(functional.pdist(features.double()).pow(2).mul(-t).exp().mean().log())


def kept_direction(before: Tensor, now: Tensor) -> float:
    """Linear CKA (Kornblith et al. 2019, equation 4) of the (B, D) and (B, E) features of the same B pictures.

    1 where one is the other turned, scaled and moved, so that pictures lie to each other as they did; towards 0 where
    nothing of that is left. 1 too where neither tells pictures apart, and 0 where only one of them does.
    """
    first, second = (rows.double() - rows.double().mean(0) for rows in (before, now))
    own = (first.T @ first).norm() * (second.T @ second).norm()
    if float(own) == 0:
        return float(float(first.norm()) == float(second.norm()))
    return float((second.T @ first).norm() ** 2 / own)
