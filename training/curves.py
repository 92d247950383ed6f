"""Draw the log of a run as curves: its losses, and below them what else was noted, each in a panel of its own."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.run_log import Line, series

COLUMNS = 4
PANEL = (3.2, 2.1)  # inches
HEAD, FOOT = 0.7, 0.5  # inches above and below all panels
MOST_TICKS = 5  # of an axis; each costs a millisecond, and a run may have twenty panels
DOTS_PER_INCH = 90
MOST_POINTS = 400  # of a curve; a longer one is thinned, so that the file stays small
# What tells nothing of training, or stands in the first panel.
LEFT_OUT = frozenset(
    {"step", "epoch", "loss", "eval_loss", "total_flos", "train_loss", "train_runtime", "train_samples_per_second"}
    | {"train_steps_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
)


def draw_curves(lines: Sequence[Line], title: str, file: Path) -> None:
    """Write a picture of `lines` to `file`, a .png; nothing while there is no loss yet.

    `loss` and the held-out `eval_loss` share the first panel; every other number has its own, in the order in which
    they came up. The file is replaced at once.
    """
    if not any("loss" in line for line in lines):
        return
    names = [name for name in _numbers(lines) if name not in LEFT_OUT]
    rows = -(-(1 + len(names)) // COLUMNS)
    height = PANEL[1] * rows + HEAD + FOOT
    figure = Figure((PANEL[0] * COLUMNS, height))
    FigureCanvasAgg(figure)
    # By hand: matplotlib's own layouts draw everything once more to measure it, which is half of the time.
    figure.subplots_adjust(left=0.05, right=0.985, bottom=FOOT / height, top=1 - HEAD / height, wspace=0.25, hspace=0.4)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    _curve(axes[0], lines, "loss", "training")
    _curve(axes[0], lines, "eval_loss", "held out")
    axes[0].legend(fontsize=7, frameon=False)
    axes[0].set_title("loss", fontsize=9)
    for axis, name in zip(axes[1:], names, strict=False):
        _curve(axis, lines, name, name)
        axis.set_title(name.replace("_", " "), fontsize=9)
    for axis in axes[1 + len(names) :]:
        axis.set_axis_off()
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("step", fontsize=8)
    partial = file.with_suffix(".partial")
    figure.savefig(partial, dpi=DOTS_PER_INCH, format="png")
    partial.replace(file)


def _numbers(lines: Sequence[Line]) -> list[str]:
    """The names of all numbers in `lines`, in the order in which they came up."""
    return list(dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, int | float)))


def _curve(axis: Axes, lines: Sequence[Line], name: str, label: str) -> None:
    steps, values = series(lines, name)
    if not steps:
        return
    every = -(-len(steps) // MOST_POINTS)
    kept = [place for place in range(len(steps)) if place % every == 0 or place == len(steps) - 1]
    axis.plot([steps[place] for place in kept], [values[place] for place in kept], label=label, linewidth=1, marker=".")
    axis.tick_params(labelsize=7)
    axis.locator_params(nbins=MOST_TICKS)
    axis.grid(alpha=0.3)
