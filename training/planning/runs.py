"""Runs that a scaling law is fitted to: how large each was, on how much it trained, and its held-out loss."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data.pictures import DataError
from training.planning.scaling_laws import Points

COLUMNS = "parameters, samples or tokens, and loss; beside them name and flops (of a whole run) where you know them"
TOKEN_FLOPS = 6.0  # of training a parameter on a token (Kaplan et al. 2020, section 2.1)


@dataclass(frozen=True)
class Run:
    """One finished run."""

    name: str
    parameters: float
    samples: float  # pictures, or tokens of text, that it saw; one that it saw twice counts twice
    loss: float  # held-out, at the end
    flops: float | None = None  # of all its training


@dataclass(frozen=True)
class Runs:
    """Runs of one task, and whether their `samples` are samples or tokens."""

    each: tuple[Run, ...]
    unit: str

    def points(self) -> Points:
        """The same as arrays."""
        columns = [[getattr(run, field) for run in self.each] for field in ("parameters", "samples", "loss")]
        return Points(*(np.array(column, dtype=np.float64) for column in columns))

    def flops_each(self) -> float:
        """k, the FLOPs of training a parameter on a sample: the geometric mean of the runs, 6 where none is known."""
        known = [run.flops / (run.parameters * run.samples) for run in self.each if run.flops is not None]
        return math.exp(math.fsum(map(math.log, known)) / len(known)) if known else TOKEN_FLOPS

    def guesses_flops(self) -> bool:
        """Whether `flops_each` is the 6 of a token, said of samples that may have many tokens."""
        return self.unit == "samples" and all(run.flops is None for run in self.each)


def rows_of(file: Path) -> Iterator[tuple[Run, str]]:
    """The runs of a .csv file, each with its unit. Raises DataError naming line and column."""
    if file.suffix.lower() != ".csv":
        raise DataError(f"{file} is no .csv file; give finished stages' folders, or a .csv with columns {COLUMNS}")
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        units = [unit for unit in ("samples", "tokens") if unit in names]
        if len(units) != 1 or not {"parameters", "loss"} <= set(names):
            raise DataError(f"{file} has the columns {', '.join(names) or '(none)'}; it needs {COLUMNS}")
        reader.fieldnames = names
        for number, row in enumerate(reader, start=2):
            where = f"{file}, line {number}"
            parameters, samples, loss = (
                positive(row[column], f"{where}, {column}") for column in ("parameters", units[0], "loss")
            )
            flops = positive(row["flops"], f"{where}, flops") if (row.get("flops") or "").strip() else None
            yield Run((row.get("name") or "").strip() or f"line {number}", parameters, samples, loss, flops), units[0]


def positive(said: Any, where: str) -> float:
    """`said` as a number. Raises DataError naming `where` it stands, unless it is finite and above 0."""
    try:
        value = float(said)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {said!r} is no number") from None
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{where}: {value:g} is not a finite number above 0; mend it, or leave that run out")
    return value
