"""Draw runs, the law that was fitted to them, and how far it reaches beyond them."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.planning.basis import distinct
from training.planning.forecast import LEVEL, Study

REACH = 100.0  # times the dearest run's FLOPs that are drawn
DOTS_PER_INCH = 120


def draw_study(found: Study, file: Path) -> None:
    """Loss over FLOPs with the best that the law says for each budget, and measured against left-out losses."""
    figure = Figure((11.5, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.6, 1])
    _curves(left, found)
    _left_out(right, found)
    figure.suptitle(f"{found.form.name}'s form on {len(found.runs.each)} runs", fontsize=11)
    figure.savefig(file, dpi=DOTS_PER_INCH)


def _curves(axis: Axes, found: Study) -> None:
    """Each size over its number of samples, and the envelope with the spread of the resampled laws."""
    points, per, law = found.runs.points(), found.runs.flops_each(), found.fitted.law
    costs = per * points.parameters * points.samples
    sizes = distinct(points.parameters)
    colours = colormaps["viridis"](np.linspace(0.1, 0.85, len(sizes)))
    for size, colour in zip(sizes, colours, strict=True):
        own = np.isclose(points.parameters, size, rtol=0.06)
        amounts = np.geomspace(points.samples.min() / 1.5, points.samples.max() * 1.5, 60)
        axis.plot(per * size * amounts, law.loss(size, amounts), color=colour, linewidth=1, alpha=0.7)
        axis.scatter(costs[own], points.losses[own], color=colour, s=22, zorder=3, label=f"{size:.3g} parameters")
    budgets = np.geomspace(costs.min(), costs.max() * REACH, 40)
    best = np.array([law.loss(*law.optimum(budget, per)) for budget in budgets])
    spread = np.array(
        [[one.loss(*law.optimum(budget, per)) for one in found.laws] for budget in budgets]
    )  # the same runs under all laws: how sure the loss is, not how sure the optimum
    low, high = np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    axis.plot(budgets, best, color="black", linewidth=1.6, label="best for the budget")
    axis.fill_between(
        budgets, low, high, color="black", alpha=0.15, linewidth=0, label=f"{LEVEL:.0%} of resampled laws"
    )
    axis.axvline(costs.max(), color="crimson", linewidth=1, linestyle=":")
    axis.annotate(
        "beyond the runs", (costs.max(), axis.get_ylim()[1]), color="crimson", fontsize=8, va="top", ha="left"
    )
    axis.set(xscale="log", yscale="log", xlabel="FLOPs of training", ylabel="held-out loss")
    axis.legend(fontsize=7, frameon=False)


def _left_out(axis: Axes, found: Study) -> None:
    """What all other runs say of a run, over its loss."""
    true = np.array([said.run.loss for said in found.left_out])
    said = np.array([one.said for one in found.left_out])
    ends = [min(true.min(), said.min()), max(true.max(), said.max())]
    axis.plot(ends, ends, color="grey", linewidth=1)
    axis.scatter(true, said, s=22, color="tab:blue")
    axis.set(xscale="log", yscale="log", xlabel="measured loss", ylabel="said by the other runs")
    axis.set_title(f"left out one by one: off by {found.error():.2%}", fontsize=9)
