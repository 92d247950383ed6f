"""What fitted laws say of a larger run, how sure they are of it, and which further run would make them surer."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.pictures import DataError
from training.planning.basis import enough, refuse_no_fall, refuse_too_little
from training.planning.runs import Run, Runs
from training.planning.scaling_laws import Array, Fit, Fitter, Form, Law, Points

LEVEL = 0.9  # of every interval
RESAMPLES = 200
MOST_TRIES = 50  # draws for one resample, before the runs are said to be too few


@dataclass(frozen=True)
class Interval:
    """A value, and the middle 90 % of what resampled runs say of it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """The loss of a run that was left out, said by all others."""

    run: Run
    said: float

    @property
    def error(self) -> float:
        """As a share of the true loss."""
        return self.said / self.run.loss - 1


@dataclass(frozen=True)
class Forecast:
    """One larger run: its loss by the law, and how many times the largest run in each respect it is."""

    parameters: float
    samples: float
    flops: float
    loss: Interval
    beyond: tuple[float, float, float]  # parameters, samples, FLOPs


@dataclass(frozen=True)
class Study:
    """What the runs say under one form."""

    form: Form
    runs: Runs
    fitted: Fit
    laws: tuple[Law, ...]  # of resampled runs
    left_out: tuple[Prediction, ...]

    def interval(self, value_of: Callable[[Law], float]) -> Interval:
        """What the law says of a value, with the spread of the resampled laws."""
        spread = np.array([value_of(law) for law in self.laws])
        low, high = np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(value_of(self.fitted.law), float(low), float(high))

    def constants(self) -> dict[str, Interval]:
        """The constants of the paper, and the exponents a and b of the optimal N and D."""
        named = {
            name: self.interval(lambda law, place=place: self.form.told(law)[place])  # type: ignore[misc]
            for place, name in enumerate(self.form.constants)
        }
        return named | {
            "a": self.interval(lambda law: law.exponents[0]),
            "b": self.interval(lambda law: law.exponents[1]),
        }

    def error(self) -> float:
        """Root mean square of the errors on runs that were left out, as a share of the loss."""
        return math.sqrt(sum(said.error**2 for said in self.left_out) / len(self.left_out))

    def forecast(self, parameters: float, samples: float) -> Forecast:
        """The loss of a run of that size on so many samples."""
        points, per = self.runs.points(), self.runs.flops_each()
        flops = per * parameters * samples
        largest = points.parameters.max(), points.samples.max(), (per * points.parameters * points.samples).max()
        beyond = tuple(float(here / there) for here, there in zip((parameters, samples, flops), largest, strict=True))
        loss = self.interval(lambda law: float(law.loss(parameters, samples)))
        return Forecast(parameters, samples, flops, loss, (beyond[0], beyond[1], beyond[2]))

    def best(self, budget: float) -> tuple[Forecast, Interval, Interval]:
        """The compute-optimal run for `budget` FLOPs, and the spread of its N and of its D."""
        per = self.runs.flops_each()
        spread = [self.interval(lambda law, place=place: law.optimum(budget, per)[place]) for place in (0, 1)]  # type: ignore[misc]
        return self.forecast(*self.fitted.law.optimum(budget, per)), spread[0], spread[1]


def study(form: Form, runs: Runs, seed: int = 0, each: Callable[[range], Iterable[int]] = iter) -> Study:
    """Fit `form` to `runs`, to resamples of them, and to all but each one; `each` may show how far it is.

    Raises DataError where the runs cannot tell the form's constants, saying what is missing.
    """
    points = runs.points()
    refuse_too_little(form, points, runs.unit)
    fitter = Fitter(form, points)
    fitted = fitter.whole()
    refuse_no_fall(form, fitted.law, points, runs.unit)
    generator = np.random.default_rng(seed)
    laws = tuple(fitter.some(_resample(points, form.free, generator), fitted.theta).law for _ in each(range(RESAMPLES)))
    return Study(form, runs, fitted, laws, tuple(_left_out(fitter, runs.each, fitted)))


def _resample(points: Points, least: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Rows drawn with replacement, drawn again until they can tell the constants."""
    for _ in range(MOST_TRIES):
        rows = generator.integers(0, len(points), len(points))
        if len(np.unique(rows)) > least and enough(points.chosen(rows)):
            return rows
    raise DataError("the runs are too few to be resampled: most draws of them lack sizes or samples; add some runs")


def _left_out(fitter: Fitter, runs: Sequence[Run], fitted: Fit) -> Iterator[Prediction]:
    """For each run that the others can do without, what they say of it."""
    points = fitter.points
    for place, run in enumerate(runs):
        others = np.delete(np.arange(len(points)), place)
        if len(others) >= fitter.form.free and enough(points.chosen(others)):
            said = fitter.some(others, fitted.theta).law.loss(run.parameters, run.samples)
            yield Prediction(run, float(said))


@dataclass(frozen=True)
class Suggestion:
    """A further run, no dearer than the dearest so far, and how far it would narrow the forecast's interval."""

    parameters: float
    samples: float
    share_of_largest: float  # of its cost
    narrowed: float  # the interval's width after it, as a share of the width before


def most_helpful_run(found: Study, target: Forecast) -> Suggestion:
    """The run that would tell most of the loss at `target`, to first order (V-optimal design).

    Candidates are sizes and amounts from a quarter of the least to four times the most, at no more than the cost of the
    dearest run.
    """
    points = found.runs.points()
    dearest = float((points.parameters * points.samples).max())
    sizes, amounts = (
        np.geomspace(values.min() / 4, values.max() * 4, 13) for values in (points.parameters, points.samples)
    )
    candidates = [(size, amount) for size in sizes for amount in amounts if size * amount <= dearest * (1 + 1e-9)]
    fitter = Fitter(found.form, points)

    def slopes(at: Sequence[tuple[float, float]]) -> Array:
        size, amount = np.log(np.array(at).T)
        return found.form.log_losses(found.fitted.theta, size - fitter.log_size, amount - fitter.log_data)[1]

    own = slopes(list(zip(points.parameters, points.samples, strict=True)))
    spread = np.linalg.pinv(own @ own.T, rcond=1e-12)
    wanted = slopes([(target.parameters, target.samples)])[:, 0]
    before = wanted @ spread @ wanted
    told = slopes(candidates)
    gained = (wanted @ spread @ told) ** 2 / (1 + np.einsum("pn,pq,qn->n", told, spread, told))
    best = int(np.argmax(gained))
    size, amount = candidates[best]
    return Suggestion(size, amount, size * amount / dearest, math.sqrt(max(0.0, 1 - gained[best] / before)))
