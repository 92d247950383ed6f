"""Draw a sheet of pictures in lines, each with a title and, where there is one, a map of where somebody looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INCHES = 1.6  # of a cell on the sheet
TITLE_INCHES = 0.3
DOTS_PER_INCH = 120
LONGEST_TITLE = 26  # characters that fit above a cell


@dataclass(frozen=True)
class Cell:
    """A picture (H, W, 3), uint8 or from 0 to 1, its title, and a map (rows, columns) to lay over it."""

    picture: np.ndarray
    title: str = ""
    heat: np.ndarray | None = None


def draw_sheet(lines: Sequence[Sequence[Cell]], file: Path) -> None:
    """Write a sheet with `lines` of cells, one below the other; the suffix of `file` decides the format."""
    columns = max(len(line) for line in lines)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure = Figure((INCHES * columns, (INCHES + TITLE_INCHES) * len(lines)), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for row, line in enumerate(lines):
        for column, axis in enumerate(axes[row]):
            if column < len(line):
                _show(axis, line[column])
            else:
                axis.axis("off")
    figure.savefig(file, dpi=DOTS_PER_INCH)


def _show(axis: Any, cell: Cell) -> None:
    axis.imshow(cell.picture, interpolation="nearest")
    if cell.heat is not None:
        height, width = cell.picture.shape[:2]
        over = (-0.5, width - 0.5, height - 0.5, -0.5)
        axis.imshow(cell.heat, cmap="inferno", alpha=0.7, interpolation="bilinear", extent=over)
    axis.set_title(shortened(cell.title, LONGEST_TITLE), fontsize=7, pad=3)
    axis.set_xticks([])
    axis.set_yticks([])


def shortened(text: str, most: int) -> str:
    """`text` with its middle left out where it has more than `most` characters: names differ at their ends."""
    if len(text) <= most:
        return text
    kept = most - 1
    return f"{text[: kept - kept // 2]}…{text[-(kept // 2) :]}"
