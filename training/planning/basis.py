"""Say whether runs are a basis for a scaling law, and which further run they lack."""

from collections.abc import Sequence

import numpy as np

from training.data.pictures import DataError
from training.planning.scaling_laws import Array, Form, Law, Points

LEAST_DISTINCT = 3  # sizes, and numbers of samples: fewer do not bend a curve
SAME = 0.05  # two sizes closer than this share of them are one
TIED = 0.98  # correlation of log N and log D from which their parts cannot be told apart
LEAST_FALL = 0.005  # share of the loss that size, or data, has to make over the runs


def distinct(values: Array) -> list[float]:
    """The different ones among `values`, rising; those within 5 % of each other are one."""
    found: list[float] = []
    for value in np.sort(values):
        if not found or value > found[-1] * (1 + SAME):
            found.append(float(value))
    return found


def enough(points: Points) -> bool:
    """Whether `points` have sizes and samples that bend a curve."""
    return min(len(distinct(points.parameters)), len(distinct(points.samples))) >= LEAST_DISTINCT


def refuse_too_little(form: Form, points: Points, unit: str) -> None:
    """Raises DataError where `points` cannot tell the constants of `form`, naming the run that would help most."""
    sizes, amounts = distinct(points.parameters), distinct(points.samples)
    small, middle = f"{sizes[0]:.3g} parameters", f"{sizes[len(sizes) // 2]:.3g} parameters"
    if len(sizes) < LEAST_DISTINCT:
        raise DataError(
            f"the runs have {_told(sizes)} different sizes ({', '.join(f'{size:.3g}' for size in sizes)} parameters), "
            f"and {LEAST_DISTINCT} are the least: nothing says how the loss falls with size. What would help most: "
            f"runs of {sizes[0] / 4:.3g} and {sizes[0] / 2:.3g} parameters on {amounts[-1]:.3g} {unit}"
        )
    if len(amounts) < LEAST_DISTINCT:
        seen = ", ".join(f"{amount:.3g}" for amount in amounts)
        raise DataError(
            f"the runs saw {_told(amounts)} different numbers of {unit} ({seen}), and {LEAST_DISTINCT} are the least: "
            "nothing says how the loss falls with data. What would help most: runs of "
            f"{middle} on {amounts[0] / 4:.3g} and {amounts[0] / 2:.3g} {unit}, each with a schedule of its own that "
            "ends there"
        )
    if len(points) <= form.free:
        raise DataError(
            f"{len(points)} runs, and {form.name}'s form has {form.free} constants: {form.free + 1} runs are the "
            f"least, and ten are a good start. What would help most: the smallest size on the most {unit} ({small} on "
            f"{amounts[-1]:.3g}), and the largest on the fewest ({sizes[-1]:.3g} parameters on {amounts[0]:.3g})"
        )
    tie = np.corrcoef(np.log(points.parameters), np.log(points.samples))[0, 1]
    if abs(tie) > TIED:
        raise DataError(
            f"size and {unit} change together in these runs (correlation {tie:.3f}): whether size or data lowers the "
            f"loss cannot be told. What would help most: {small} on {amounts[-1 if tie > 0 else 0]:.3g} {unit}"
        )


def refuse_no_fall(form: Form, law: Law, points: Points, unit: str) -> None:
    """Raises DataError where by `law` size, or data, hardly lowers the loss: it has no best split between them then."""
    sizes, amounts = points.parameters, points.samples
    best = float(law.loss(sizes.max(), amounts.max()))
    by_size = 1 - best / float(law.loss(sizes.min(), amounts.max()))
    by_data = 1 - best / float(law.loss(sizes.max(), amounts.min()))
    if by_size < LEAST_FALL:
        raise DataError(
            f"the loss does not fall with size in these runs: by {form.name}'s form {sizes.max():.3g} parameters are "
            f"{by_size:.1%} better than {sizes.min():.3g} on as many {unit}, so nothing can be said of larger ones. "
            "Most often one learning rate was taken for all sizes, or the runs are too short for size to matter. What "
            f"would help most: the largest size with a lower rate, and on {4 * amounts.max():.3g} {unit}"
        )
    if by_data < LEAST_FALL:
        raise DataError(
            f"the loss does not fall with {unit} in these runs: by {form.name}'s form {amounts.max():.3g} are "
            f"{by_data:.1%} better than {amounts.min():.3g}. What would help most: runs on "
            f"{amounts.min() / 16:.3g} and {amounts.min() / 4:.3g} {unit}, each with a schedule of its own"
        )


def _told(found: Sequence[float]) -> str:
    return "no" if len(found) < 2 else str(len(found))
