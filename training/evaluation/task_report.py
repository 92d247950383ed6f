"""The scores of tasks as JSON and as a table, with their intervals and what they were made of."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import isnan
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from training.evaluation.resampling import Measure, Unit, difference_of, interval_of
from training.evaluation.task_run import TaskFindings

PACKAGES = ("kangaroo-assistant", "torch", "transformers", "openai", "numpy", "pycocoevalcap")
ALPHA = 0.05  # differences with a smaller p are called significant


def said_of_task(findings: TaskFindings, compared: Sequence[tuple[Measure, Measure]] = ()) -> dict[str, Any]:
    """A task's part of the report, ready for JSON; `compared` are the same scores of two models, see `task_run`."""
    asked = findings.asked
    return {
        "task": asked.name,
        "about": asked.task.about,
        "kind": asked.task.kind,
        "settings": asked.task.model_dump(mode="json", exclude={"about", "kind"}),
        "sha256": asked.sha256,
        "questions": len(asked.items),
        "pictures": len(asked.pictures),
        "pictures_decoded": asked.pictures.decoded,
        "left_out": asked.left_out,
        "answered": len(findings.items),
        "answered_now": findings.of_now,
        "seconds": round(findings.seconds, 2),
        "partial": bool(findings.unanswered),
        "unanswered": [{"id": id, "why": why} for id, why in findings.unanswered.items()],
        "notes": list(findings.notes),
        "scores": [said_of_score(measure) for measure in findings.measures],
        "compared": [said_of_difference(*pair) for pair in compared],
    }


def said_of_score(measure: Measure) -> dict[str, Any]:
    """A score with its 95 % interval; None where nothing says it (a precision of nothing)."""
    found = interval_of(measure)
    return {
        "score": measure.name,
        "of": measure.part,
        "value": _said(found.value),
        "low": _said(found.low),
        "high": _said(found.high),
        "unit": measure.unit,
        "chance": measure.chance,
        "majority": measure.majority,
        "questions": measure.items,
        "groups": len(measure.groups),
        "better": "lower" if measure.lower_is_better else "higher",
    }


def said_of_difference(first: Measure, second: Measure) -> dict[str, Any]:
    """The first model's score less the second's, with its interval and p."""
    found = difference_of(first, second)
    return {
        "score": first.name,
        "of": first.part,
        "first": _said(float(first.value(first.counts.sum(0)))),
        "second": _said(float(second.value(second.counts.sum(0)))),
        "difference": _said(found.value),
        "low": _said(found.low),
        "high": _said(found.high),
        "p": _said(found.p),
        "test": found.test,
        "questions": first.items,
        "unit": first.unit,
        "significant": found.p < ALPHA,
    }


def versions() -> dict[str, str]:
    """The versions of what scores hang on, as far as it is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def score_table(task: Mapping[str, Any]) -> Table:
    """The scores of a task, one row each; it fits into 80 columns."""
    table = _table(f"{task['task']}: {task['answered']:,} of {task['questions']:,} questions answered")
    for column in ("score", "of"):
        table.add_column(column)
    for column in ("value", "95 % interval", "baseline", "questions"):
        table.add_column(column, justify="right", no_wrap=True)
    for score in task["scores"]:
        unit = score["unit"]
        baseline = score["majority"] if score["majority"] is not None else score["chance"]
        table.add_row(
            score["score"],
            score["of"] or "",
            written(score["value"], unit),
            f"{written(score['low'], unit)} - {written(score['high'], unit)}",
            written(baseline, unit) if baseline is not None else "",
            str(score["questions"]),
        )
    return table


def difference_table(task: Mapping[str, Any], other: str) -> Table:
    """What a model scores more than the other one on the same questions, and how often chance does that."""
    table = _table(f"{task['task']}, less {other}")
    for column in ("score", "of"):
        table.add_column(column)
    for column in ("difference", "95 % interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("test")
    for found in task["compared"]:
        unit = found["unit"]
        low, high = (written(found[end], unit, sign=True) for end in ("low", "high"))
        p = "–" if found["p"] is None else f"{found['p']:.4f}"
        table.add_row(
            found["score"],
            found["of"] or "",
            written(found["difference"], unit, sign=True),
            f"{low} to {high}",
            p,
            found["test"],
        )
    return table


def written(value: float | None, unit: Unit, sign: bool = False) -> str:
    """A value as people read it: shares in percent, points with one digit behind the point, others with three."""
    if value is None:
        return "–"
    plus = "+" if sign else ""
    return format(100 * value if unit == "share" else value, f"{plus}.3f" if unit == "plain" else f"{plus}.1f")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)


def _said(value: float) -> float | None:
    return None if isnan(value) else value
