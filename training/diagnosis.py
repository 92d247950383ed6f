"""Say in words what the log of a run shows when it goes wrong, and what usually helps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from training.run_log import Line, series

# In its first steps a loss need not fall yet, and a teacher may find all prototypes alike: a share of all, and so many.
GRACE, GRACE_STEPS = 0.25, 300
FEWEST_LINES = 5  # of the log that all have to show the same
ONE_POINT = 0.01  # spread of features: 1 is at random
LEFT = 0.1  # share that is left of what a measure was before training
FEW_DIRECTIONS = 1.5  # in which features differ: 1 is a line
UNIFORM = 0.99  # entropy of a teacher's probabilities, as a share of the largest
ONE_PROTOTYPE = 1.05
ENOUGH_SAMPLES = 8  # a step of fewer may well use one prototype
STUCK = 0.98  # share of what one pays who knows nothing
FOUND_MORE = 1.5  # times as often as at first: one who finds more has learned something, whatever the loss says
EXPLODED = 50.0  # times the median of the gradients before
EXPLODED_LINES = 3
AT_LIMIT = 0.999


@dataclass(frozen=True)
class Expected:
    """What is known of a run before it begins."""

    steps: int
    samples: int  # a step, over all ranks
    untaught: Mapping[str, float]  # by name: the loss of one who cannot tell the samples of a step apart
    largest: Mapping[str, float]  # by name: where a value is held back
    finds: Sequence[str] = ()  # names of the shares of samples that find their own among all


@dataclass(frozen=True)
class Finding:
    """One thing that goes wrong: what it is called in the log, and what people are told."""

    kind: str
    words: str


def diagnose(lines: Sequence[Line], expected: Expected) -> list[Finding]:
    """All that goes wrong by the end of `lines`, which are in the order of their steps."""
    return [Finding(kind, words) for kind, rule in RULES.items() if (words := rule(lines, expected)) is not None]


def _one_point(lines: Sequence[Line], expected: Expected) -> str | None:
    _, spreads = series(lines, "spread")
    if len(spreads) < 2 or spreads[-1] >= min(ONE_POINT, LEFT * spreads[0]):
        return None
    return (
        f"Collapse to one point: all held-out pictures have nearly the same features (spread {spreads[-1]:.4f}; it was "
        f"{spreads[0]:.2f} before training). What usually helps: a lower learning_rate with a longer warm-up, and a "
        "loss that pushes different pictures apart (other pictures as negatives and a larger batch; with a teacher, "
        "centring and a momentum nearer to 1)."
    )


def _few_directions(lines: Sequence[Line], expected: Expected) -> str | None:
    _, directions = series(lines, "directions")
    few = max(min(FEW_DIRECTIONS, directions[0] / 2), LEFT * directions[0]) if directions else 0.0
    if len(directions) < 3 or max(directions[-2:]) >= few or _one_point(lines, expected) is not None:
        return None
    return (
        f"Collapse to few dimensions: held-out pictures differ along {directions[-1]:.1f} directions, and there were "
        f"{directions[0]:.1f} before training. What usually helps: a larger batch, a lower learning_rate, less weight "
        "decay, stronger augmentations that differ from view to view, a wider or deeper head, or KoLeo (dinov2)."
    )


def _uniform_teacher(lines: Sequence[Line], expected: Expected) -> str | None:
    newest = _newest_behind_grace(lines, "teacher_entropy", expected)
    if not newest or min(newest) < UNIFORM:
        return None
    return (
        f"Collapse of the teacher: all prototypes are alike to it ({newest[-1]:.1%} of the largest entropy), so that "
        "the student has nothing to learn. What usually helps: sharpen more (a lower teacher_temperature, 0.04 to "
        "0.07), a centre_momentum nearer to 1, a lower learning_rate with a longer warm-up, or fewer prototypes."
    )


def _one_prototype(lines: Sequence[Line], expected: Expected) -> str | None:
    _, used = series(lines, "prototypes_used")
    newest = used[-FEWEST_LINES:]
    if len(newest) < FEWEST_LINES or max(newest) > ONE_PROTOTYPE or expected.samples < ENOUGH_SAMPLES:
        return None
    return (
        "Collapse of the teacher: it names the same prototype for every crop of every picture. What usually helps: "
        "centring that keeps up (a smaller centre_momentum), a higher teacher_temperature or a warm-up of it, a "
        "momentum of the teacher nearer to 1, and a larger batch."
    )


def _stuck(lines: Sequence[Line], expected: Expected) -> str | None:
    for name, untaught in expected.untaught.items():
        newest = _newest_behind_grace(lines, name, expected)
        if untaught > 0 and newest and min(newest) >= STUCK * untaught and not _finds_more(lines, expected):
            return (
                f"The loss has not learned anything: {name} is {newest[-1]:.3f}, and one who cannot tell the "
                f"{expected.samples} samples of a step apart pays {untaught:.3f}. What usually helps: another "
                "learning_rate (ten times lower; higher where the loss does not move at all), a longer warm-up, and a "
                "look at the data: do texts belong to their pictures, are pictures different from each other?"
            )
    return None


def _finds_more(lines: Sequence[Line], expected: Expected) -> bool:
    found = [values for _, values in (series(lines, name) for name in expected.finds) if len(values) > FEWEST_LINES]
    chance = 1 / expected.samples
    return any(
        fmean(values[-FEWEST_LINES:]) > max(2 * chance, FOUND_MORE * fmean(values[:FEWEST_LINES])) for values in found
    )


def _at_limit(lines: Sequence[Line], expected: Expected) -> str | None:
    for name, limit in expected.largest.items():
        _, values = series(lines, name)
        newest = values[-FEWEST_LINES:]
        # A published CLIP begins at the limit, and is well there.
        if len(newest) == FEWEST_LINES and min(newest) >= AT_LIMIT * limit and values[0] < AT_LIMIT * limit:
            return (
                f"{name} has grown to its limit of {limit:g} and is held there: the loss would be sharper still. Where "
                "the held-out loss rises too, the run learns its pictures by heart: take more data, a lower "
                "learning_rate or more weight decay."
            )
    return None


def _no_gradient(lines: Sequence[Line], expected: Expected) -> str | None:
    _, norms = series(lines, "grad_norm")
    if len(norms) < FEWEST_LINES or max(norms[-FEWEST_LINES:]) > 0:
        return None
    return (
        "The gradient is zero, so nothing trains. What usually helps: see that the loss hangs on what trains (trains, "
        "frozen parts), and that features have not collapsed to one point, from where no gradient leads away; then "
        "begin again with a lower learning_rate."
    )


def _gradient_explodes(lines: Sequence[Line], expected: Expected) -> str | None:
    _, norms = series(lines, "grad_norm")
    before, newest = norms[:-EXPLODED_LINES], norms[-EXPLODED_LINES:]
    if len(before) < 2 * FEWEST_LINES or min(newest) <= EXPLODED * median(before) or median(before) == 0:
        return None
    return (
        f"The gradient explodes: its length is {newest[-1]:.3g} and was {median(before):.3g} in the middle of the run "
        "(it is clipped to 1, so that only its direction is left). What usually helps: a lower learning_rate, a longer "
        "warm-up, bf16: false, and a look at the pictures and texts of the last steps."
    )


def _not_finite(lines: Sequence[Line], expected: Expected) -> str | None:
    _, shares = series(lines, "features_not_finite")
    if not shares or shares[-1] == 0:
        return None
    return (
        f"The features of {shares[-1]:.0%} of the held-out pictures are not finite numbers: the weights are spoiled. "
        "What usually helps: go back to a checkpoint from before (delete the newer ones), with a lower learning_rate, "
        "a longer warm-up, or bf16: false."
    )


def _newest_behind_grace(lines: Sequence[Line], name: str, expected: Expected) -> list[float]:
    """The newest values of `name`, all from behind the grace; none where there are too few."""
    steps, values = series(lines, name)
    grace = max(GRACE * expected.steps, GRACE_STEPS)
    behind = [value for step, value in zip(steps, values, strict=True) if step > grace]
    return behind[-FEWEST_LINES:] if len(behind) >= FEWEST_LINES else []


RULES: Mapping[str, Callable[[Sequence[Line], Expected], str | None]] = {
    "one_point": _one_point,
    "few_directions": _few_directions,
    "uniform_teacher": _uniform_teacher,
    "one_prototype": _one_prototype,
    "stuck": _stuck,
    "at_limit": _at_limit,
    "no_gradient": _no_gradient,
    "gradient_explodes": _gradient_explodes,
    "not_finite": _not_finite,
}
