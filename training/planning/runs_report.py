"""Say what small runs tell of larger ones: tables for people, JSON for programs, and a picture of the curves."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from training.data.pictures import DataError
from training.planning.drawing import draw_study
from training.planning.finished_stages import read_runs
from training.planning.forecast import LEVEL, RESAMPLES, Forecast, Interval, Study, most_helpful_run, study
from training.planning.runs import Runs
from training.planning.scaling_laws import FORMS

NEXT = (1, 3, 10, 30, 100)  # budgets, in multiples of the dearest run
FAR = 10.0  # times the dearest run, past which a forecast is called a guess


def report_runs(
    paths: Sequence[Path],
    out: Path,
    console: Console,
    budget: float | None = None,
    asked: tuple[float, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit both forms, print what they say, and write curves.png and plan.json into `out`.

    `budget` is FLOPs to spend best; `asked` the parameters and samples of one run. Raises DataError where the runs are
    no basis for a law.
    """
    runs = read_runs(paths)
    studies, refused = _studies(runs, seed, console)
    chosen = min(studies, key=Study.error)
    console.print(_fits_table(studies))
    for reason in refused:
        console.print(f"Not fitted: {reason}", soft_wrap=True, highlight=False)
    forecasts = _forecasts(chosen, budget)
    console.print(_forecast_table(chosen, forecasts))
    if asked is not None:
        console.print(_asked_line(chosen, chosen.forecast(*asked)), soft_wrap=True, highlight=False)
    for line in _warnings(studies, chosen):
        console.print(line, soft_wrap=True, highlight=False)
    out.mkdir(parents=True, exist_ok=True)
    draw_study(chosen, out / "curves.png")
    facts = _facts(studies, chosen, forecasts, chosen.forecast(*asked) if asked else None)
    (out / "plan.json").write_text(json.dumps(facts, indent=2) + "\n")
    console.print(f"see {out / 'curves.png'}; the numbers are in {out / 'plan.json'}", soft_wrap=True, highlight=False)
    return facts


def _studies(runs: Runs, seed: int, console: Console) -> tuple[list[Study], list[DataError]]:
    """The forms that could be fitted, and why others could not. Raises DataError where none could."""
    studies: list[Study] = []
    refused: list[DataError] = []
    for form in FORMS:
        shown = partial(track, description=f"{form.name}'s form", console=console, transient=True)
        try:
            studies.append(study(form, runs, seed, shown))
        except DataError as error:
            refused.append(error)
    if not studies:
        raise refused[0]
    return studies, refused


Best = tuple[Forecast, Interval, Interval]


def _forecasts(chosen: Study, budget: float | None) -> list[Best]:
    points = chosen.runs.points()
    dearest = float((points.parameters * points.samples).max()) * chosen.runs.flops_each()
    budgets = {dearest * times for times in NEXT} | ({budget} if budget is not None else set())
    return [chosen.best(one) for one in sorted(budgets)]


def _fits_table(studies: Sequence[Study]) -> Table:
    table = Table(
        title=f"fitted to {len(studies[0].runs.each)} runs, with {LEVEL:.0%} intervals over {RESAMPLES} resamples",
        caption="the best N grows with compute to the power of a, the best D to that of b",
    )
    for column in ("form", "constants", "off by, left out", "worst"):
        table.add_column(column, justify="left" if column in ("form", "constants") else "right")
    for one in studies:
        constants = "\n".join(f"{name} = {spread(value)}" for name, value in one.constants().items())
        worst = max(one.left_out, key=lambda said: abs(said.error))
        table.add_row(one.form.name, constants, f"{one.error():.2%}", f"{worst.error:+.2%}, {worst.run.name}")
        table.add_section()
    return table


def spread(value: Interval) -> str:
    """`0.34 (0.32-0.36)`."""
    return f"{value.value:.3g} ({value.low:.3g}-{value.high:.3g})"


def short(count: float) -> str:
    """`177M` for 1.77e8: how people write sizes."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:.3g}"


def _stacked(value: Interval, told: Callable[[float], str]) -> str:
    """A value, and its interval in a line of its own."""
    return f"{told(value.value)}\n{told(value.low)}-{told(value.high)}"


def _forecast_table(chosen: Study, forecasts: Sequence[Best]) -> Table:
    table = Table(title=f"the best run for a budget, by {chosen.form.name}'s form")
    for column in ("FLOPs", "times the dearest", "parameters", chosen.runs.unit, "loss", "beyond the largest"):
        table.add_column(column, justify="right")
    for forecast, size, amount in forecasts:
        parameters, samples, flops = forecast.beyond
        table.add_row(
            f"{forecast.flops:.3g}",
            f"{flops:.3g}",
            _stacked(size, short),
            _stacked(amount, short),
            _stacked(forecast.loss, "{:.4g}".format),
            f"N x {parameters:.2g}\nD x {samples:.2g}",
        )
    return table


def _asked_line(chosen: Study, forecast: Forecast) -> str:
    parameters, samples, flops = forecast.beyond
    return (
        f"{short(forecast.parameters)} parameters on {short(forecast.samples)} {chosen.runs.unit}: loss "
        f"{forecast.loss.value:.4g} ({forecast.loss.low:.4g} to {forecast.loss.high:.4g}), {forecast.flops:.3g} FLOPs. "
        f"That is {parameters:.3g} times the largest run in parameters, {samples:.3g} in {chosen.runs.unit} and "
        f"{flops:.3g} times the dearest in FLOPs."
    )


def _warnings(studies: Sequence[Study], chosen: Study) -> list[str]:
    points, runs = chosen.runs.points(), chosen.runs
    dearest = float((points.parameters * points.samples).max()) * runs.flops_each()
    target = chosen.best(FAR * dearest)[0]
    lines = [
        "An interval is of the curve, not of one run, and holds only where the form does: past "
        f"{FAR:g} times the dearest run take it for a guess. Each loss belongs to a run whose schedule ends there."
    ]
    if len(studies) > 1:
        said = [float(one.fitted.law.loss(target.parameters, target.samples)) for one in studies]
        lines.append(
            f"At {FAR:g} times the dearest run {studies[0].form.name}'s form says {said[0]:.4g} and "
            f"{studies[1].form.name}'s {said[1]:.4g}: what lies between them no interval shows."
        )
    if runs.guesses_flops():
        lines.append(
            "FLOPs are counted as 6 a parameter and sample, as if a sample were one token. A picture has many: add a "
            "column flops (of the whole run) to have budgets in true FLOPs; the split between N and D is the same."
        )
    help_most = most_helpful_run(chosen, target)
    lines.append(
        f"A further run of {short(help_most.parameters)} parameters on {short(help_most.samples)} {runs.unit} "
        f"({help_most.share_of_largest:.0%} of the dearest run) would help most: it would narrow the interval there to "
        f"about {help_most.narrowed:.0%}."
    )
    return lines


def _facts(
    studies: Sequence[Study], chosen: Study, forecasts: Sequence[Best], asked: Forecast | None
) -> dict[str, Any]:
    def told(forecast: Forecast) -> dict[str, Any]:
        names = ("parameters", "samples", "flops")
        return {name: getattr(forecast, name) for name in names} | {
            "loss": vars(forecast.loss),
            "times_the_largest_run": dict(zip(names, forecast.beyond, strict=True)),
        }

    return {
        "runs": [vars(run) for run in chosen.runs.each],
        "unit": chosen.runs.unit,
        "flops_a_parameter_and_sample": chosen.runs.flops_each(),
        "level": LEVEL,
        "resamples": RESAMPLES,
        "forms": {
            one.form.name: {
                "source": one.form.source,
                "constants": {name: vars(value) for name, value in one.constants().items()},
                "left_out_error": one.error(),
                "left_out": [
                    {"name": said.run.name, "loss": said.run.loss, "said": said.said} for said in one.left_out
                ],
            }
            for one in studies
        },
        "chosen": chosen.form.name,
        "best": [
            told(forecast) | {"parameters_interval": vars(n), "samples_interval": vars(d)}
            for forecast, n, d in forecasts
        ],
        "asked": told(asked) if asked else None,
    }
