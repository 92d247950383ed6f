"""Scaling laws: two forms of a loss that falls with parameters and samples, and how either is fitted to runs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3  # of the Huber loss, as in Hoffmann et al. (2022), section 3.3
POLISHED = 12  # starts that go on to L-BFGS, out of the whole grid
SHARES_OF_FLOOR = (0.05, 0.3, 0.6, 0.9)  # of the lowest loss
SPLITS = (0.2, 0.5, 0.8)  # of what lies above the floor, the share that size explains
EXPONENTS = (0.1, 0.25, 0.5, 0.9)
STEEPNESS = (0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Points:
    """n runs as arrays (n,): parameters N, samples D and losses L."""

    parameters: Array
    samples: Array
    losses: Array

    def __len__(self) -> int:
        return len(self.losses)

    def chosen(self, rows: NDArray[np.int64]) -> "Points":
        """The runs of these rows, which may repeat."""
        return Points(self.parameters[rows], self.samples[rows], self.losses[rows])


@dataclass(frozen=True)
class Law:
    """(floor + size / N^alpha + data / D^beta)^power: what both forms are, written in one way.

    Chinchilla: floor E, size A, data B, power 1. Kaplan: floor 0, size N_c^(alpha_N / alpha_D), data D_c, beta 1, power
    alpha_D.
    """

    floor: float
    size: float
    data: float
    alpha: float
    beta: float
    power: float = 1.0

    def loss(self, parameters: Array | float, samples: Array | float) -> Array:
        """L for each pair of N and D."""
        inner = self.floor + self.size * np.power(parameters, -self.alpha) + self.data * np.power(samples, -self.beta)
        return np.asarray(inner) ** self.power

    def optimum(self, budget: float, flops: float = 6.0) -> tuple[float, float]:
        """N and D with the lowest loss for a `budget` of FLOPs, where a run costs `flops` x N x D.

        Hoffmann et al. (2022), equation 4, which holds for any increasing function of the sum, and so for both forms:
        N = G (C / k)^a, D = (C / k)^b / G, with a = beta / (alpha + beta), b = alpha / (alpha + beta) and
        G = (alpha A / (beta B))^(1 / (alpha + beta)).
        """
        product, both = budget / flops, self.alpha + self.beta
        balance = (np.log(self.alpha * self.size) - np.log(self.beta * self.data)) / both
        parameters = float(np.exp(balance + self.beta / both * np.log(product)))
        return parameters, product / parameters

    @property
    def exponents(self) -> tuple[float, float]:
        """a and b: the optimal N grows with the budget to the power of a, D to that of b; a + b = 1."""
        both = self.alpha + self.beta
        return self.beta / both, self.alpha / both


class Form(ABC):
    """A family of laws, with unbounded numbers `theta` (..., P) that name one of them.

    Sizes and samples enter as logarithms, centred at the runs' own mean: then the numbers hardly pull at each other,
    and the unit of size, samples or loss changes nothing.
    """

    name: str
    source: str
    constants: tuple[str, ...]

    @property
    def free(self) -> int:
        """P, how many constants are fitted."""
        return len(self.constants)

    @abstractmethod
    def log_losses(self, theta: Array, sizes: Array, data: Array) -> tuple[Array, Array]:
        """log L (..., n) and its derivative by theta (..., P, n); centred log N and log D are (n,)."""

    @abstractmethod
    def starts(self, points: Points) -> Array:
        """(S, P) numbers to start from."""

    @abstractmethod
    def law(self, theta: Array, log_size: float, log_data: float) -> Law:
        """The law of `theta` (P,), given the means that were taken off log N and log D."""

    @abstractmethod
    def told(self, law: Law) -> tuple[float, ...]:
        """The constants of `law` under the names of the paper, in the order of `constants`."""


class Chinchilla(Form):
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2); theta is log E, log A', log B', log alpha,
    log beta, with A' and B' the terms at the mean of the runs."""

    name = "Chinchilla"
    source = "Hoffmann et al. 2022, equation 2, approach 3"
    constants = ("E", "A", "B", "alpha", "beta")

    def log_losses(self, theta: Array, sizes: Array, data: Array) -> tuple[Array, Array]:
        floor, size, of_data, alpha, beta = np.moveaxis(theta[..., None], -2, 0)
        alpha, beta = np.exp(alpha), np.exp(beta)
        terms = np.stack(np.broadcast_arrays(floor, size - alpha * sizes, of_data - beta * data), axis=-2)
        total, shares = _log_sum(terms)
        slopes = np.stack([-alpha * sizes * shares[..., 1, :], -beta * data * shares[..., 2, :]], axis=-2)
        return total, np.concatenate([shares, slopes], axis=-2)

    def starts(self, points: Points) -> Array:
        floors = np.log(points.losses.min() * np.array(SHARES_OF_FLOOR))
        above = np.median(points.losses) - np.exp(floors)
        return np.array(
            [
                (floor, np.log(rest * split), np.log(rest * (1 - split)), np.log(alpha), np.log(beta))
                for floor, rest in zip(floors, above, strict=True)
                for split in SPLITS
                for alpha in EXPONENTS
                for beta in EXPONENTS
            ]
        )

    def law(self, theta: Array, log_size: float, log_data: float) -> Law:
        alpha, beta = float(np.exp(theta[3])), float(np.exp(theta[4]))
        size, data = np.exp(theta[1] + alpha * log_size), np.exp(theta[2] + beta * log_data)
        return Law(float(np.exp(theta[0])), float(size), float(data), alpha, beta)

    def told(self, law: Law) -> tuple[float, ...]:
        return law.floor, law.size, law.data, law.alpha, law.beta


class Kaplan(Form):
    """L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (Kaplan et al. 2020, equation 1.5), which falls to zero;
    theta is the two terms' logarithms at the mean of the runs, log(alpha_N / alpha_D) and log alpha_D."""

    name = "Kaplan"
    source = "Kaplan et al. 2020, equation 1.5"
    constants = ("N_c", "D_c", "alpha_N", "alpha_D")

    def log_losses(self, theta: Array, sizes: Array, data: Array) -> tuple[Array, Array]:
        size, of_data, ratio, power = np.moveaxis(theta[..., None], -2, 0)
        ratio, power = np.exp(ratio), np.exp(power)
        terms = np.stack(np.broadcast_arrays(size - ratio * sizes, of_data - data), axis=-2)
        total, shares = _log_sum(terms)
        slopes = np.stack([-ratio * sizes * shares[..., 0, :], total], axis=-2)
        return power * total, power[..., None] * np.concatenate([shares, slopes], axis=-2)

    def starts(self, points: Points) -> Array:
        middle = np.log(np.median(points.losses))
        return np.array(
            [
                (middle / power + np.log(split), middle / power + np.log(1 - split), np.log(ratio), np.log(power))
                for power in STEEPNESS
                for split in SPLITS
                for ratio in (0.4, 0.8, 1.2, 2.0)
            ]
        )

    def law(self, theta: Array, log_size: float, log_data: float) -> Law:
        ratio, power = float(np.exp(theta[2])), float(np.exp(theta[3]))
        size, data = np.exp(theta[0] + ratio * log_size), np.exp(theta[1] + log_data)
        return Law(0.0, float(size), float(data), ratio, 1.0, power)

    def told(self, law: Law) -> tuple[float, ...]:
        return law.size ** (1 / law.alpha), law.data, law.alpha * law.power, law.power


FORMS: tuple[Form, ...] = (Chinchilla(), Kaplan())


def _log_sum(terms: Array) -> tuple[Array, Array]:
    """log of the sum of exp(terms) (..., k, n) over k, and each term's share of it."""
    highest = terms.max(axis=-2, keepdims=True)
    shares = np.exp(terms - highest)
    total = shares.sum(axis=-2, keepdims=True)
    return (highest + np.log(total))[..., 0, :], shares / total


@dataclass(frozen=True)
class Fit:
    """A law, the numbers it came from, and the Huber loss that is left (in units of DELTA squared)."""

    law: Law
    theta: Array
    misfit: float


class Fitter:
    """Fits laws of one form to runs, or to some of them."""

    def __init__(self, form: Form, points: Points) -> None:
        self.form, self.points = form, points
        sizes, data = np.log(points.parameters), np.log(points.samples)
        self.log_size, self.log_data = float(sizes.mean()), float(data.mean())
        self.sizes, self.data, self.losses = sizes - self.log_size, data - self.log_data, np.log(points.losses)

    def whole(self) -> Fit:
        """The law with the least Huber loss between logarithms of losses (Hoffmann et al. 2022, equation 3).

        L-BFGS goes on from the best of a grid of starts. The grid is relative to the runs, so that it fits losses of
        any unit; the paper's is absolute.
        """
        starts = self.form.starts(self.points)
        rows = np.arange(len(self.points))
        best = np.argsort([self._misfit(start, rows)[0] for start in starts])[:POLISHED]
        return min((self.some(rows, starts[place]) for place in best), key=lambda found: found.misfit)

    def some(self, rows: NDArray[np.int64], start: Array) -> Fit:
        """The law of the runs `rows`, which may repeat, that L-BFGS finds from the numbers `start`."""
        theta = torch.tensor(start)
        optimiser = torch.optim.LBFGS(
            [theta], max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
        )

        def misfit() -> float:
            value, slope = self._misfit(theta.detach().numpy(), rows)
            theta.grad = torch.from_numpy(slope)
            return value

        optimiser.step(misfit)
        found = theta.detach().numpy()
        return Fit(self.form.law(found, self.log_size, self.log_data), found, self._misfit(found, rows)[0])

    def _misfit(self, theta: Array, rows: NDArray[np.int64]) -> tuple[float, Array]:
        """The summed Huber loss of `rows` and its derivative by theta (P,), in units of DELTA squared."""
        fitted, slopes = self.form.log_losses(theta, self.sizes[rows], self.data[rows])
        away = (fitted - self.losses[rows]) / DELTA
        pull = np.clip(away, -1.0, 1.0)
        return float((pull * (away - pull / 2)).sum()), slopes @ pull / DELTA
