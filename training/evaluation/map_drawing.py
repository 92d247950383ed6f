"""Draw a map of pictures: small copies of some where they lie, and a dot for each in the colour of its label."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from assistant.images import open_picture
from training.evaluation.drawing import shortened
from training.evaluation.embedding_map import Placed

INCHES = 7.0  # of a side of the map
DOTS_PER_INCH = 150
LEAST_SHARE, MOST_SHARE = 0.055, 0.14  # of a side of the map that a small copy with its margin takes
COPY_PIXELS = 160
COLOURS = tuple(colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2])  # type: ignore[attr-defined]
REST = "0.75"  # grey, of the labels beyond the colours
LONGEST_LABEL = 28  # characters in the legend


def draw_map(placed: Placed, labels: Sequence[str | None], title: str, file: Path, seed: int) -> None:
    """Write the map to `file`, whose suffix decides the format.

    On the left lie small copies of as many pictures as have room, chosen with `seed`; on the right, where there are
    labels, a dot for every picture, the commonest labels in colours of their own.
    """
    labelled = any(label is not None for label in labels)
    figure = Figure((INCHES * (2 if labelled else 1) + (2.2 if labelled else 0), INCHES + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if labelled else 1, squeeze=False)[0]
    colours = label_colours(labels)
    figure.suptitle(f"{title}: {len(placed.files):,} pictures, alike ones near (t-SNE)", fontsize=12)
    _draw_copies(panels[0], placed, [colours[label] if labelled else "0.5" for label in labels], seed)
    if labelled:
        _draw_dots(panels[1], placed, labels, colours)
    figure.savefig(file, dpi=DOTS_PER_INCH)


def label_colours(labels: Sequence[str | None]) -> dict[str | None, Any]:
    """A colour for each label, the commonest first; grey for those that are left, and for no label."""
    ranked = Counter(label for label in labels if label is not None).most_common()
    ranked.sort(key=lambda pair: (-pair[1], pair[0]))
    colours: dict[str | None, Any] = {None: REST}
    for rank, (label, _) in enumerate(ranked):
        colours[label] = COLOURS[rank] if rank < len(COLOURS) else REST
    return colours


def spread(points: np.ndarray, distance: float, seed: int) -> list[int]:
    """Numbers of points (N, 2) that keep `distance` on one axis at least: squares of that side do not overlap."""
    kept: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(points)).tolist():
        gaps = np.abs(points[kept] - points[number]).max(1) if kept else np.array([1.0])
        if gaps.min() >= distance:
            kept.append(number)
    return kept


def copy_share(pictures: int) -> float:
    """Of a side of the map, the longer side of a small copy: the fewer there are, the larger."""
    return float(np.clip(0.9 / np.sqrt(pictures), LEAST_SHARE, MOST_SHARE))


def _draw_copies(axis: Any, placed: Placed, colours: Sequence[Any], seed: int) -> None:
    _empty(axis)
    share = copy_share(len(placed.files))
    for number in spread(placed.points, share, seed):
        picture = open_picture(placed.files[number], enough=COPY_PIXELS)
        picture.thumbnail((COPY_PIXELS, COPY_PIXELS))
        longer = max(picture.size)
        width, height = (0.45 * share * side / longer for side in picture.size)
        x, y = placed.points[number]
        box = (x - width, x + width, y - height, y + height)
        axis.imshow(np.array(picture), extent=box, interpolation="antialiased", zorder=2)
        frame = {"fill": False, "edgecolor": colours[number], "linewidth": 1.6, "zorder": 3}
        axis.add_patch(_rectangle(box, frame))
    _fit(axis, len(placed.files))


def _draw_dots(axis: Any, placed: Placed, labels: Sequence[str | None], colours: dict[str | None, Any]) -> None:
    _empty(axis)
    size = float(np.clip(4000 / len(labels), 6, 40))
    places: dict[str | None, list[int]] = {label: [] for label in colours}
    for number, label in enumerate(labels):
        places[label].append(number)
    own = [label for label in colours if label is not None and colours[label] is not REST]
    others = [label for label in colours if colours[label] is REST and places[label]]
    for label in (*others, *own):
        points = placed.points[places[label]]
        axis.scatter(points[:, 0], points[:, 1], s=size, color=colours[label], linewidths=0)
    said = [(f"{shortened(str(label), LONGEST_LABEL)} ({len(places[label])})", colours[label]) for label in own]
    rest = sum(len(places[label]) for label in others)
    if rest:
        said.append((f"others ({rest})", REST))
    handles = [axis.scatter([], [], s=40, color=colour, label=text) for text, colour in said]
    axis.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    _fit(axis, len(placed.files))


def _rectangle(box: tuple[float, float, float, float], style: dict[str, Any]) -> Rectangle:
    left, right, bottom, top = box
    return Rectangle((left, bottom), right - left, top - bottom, **style)


def _empty(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _fit(axis: Any, pictures: int) -> None:
    """The whole map with room for the copies at its edge; imshow would otherwise cut to the last one."""
    margin = 0.6 * copy_share(pictures)
    axis.set_xlim(-margin, 1 + margin)
    axis.set_ylim(-margin, 1 + margin)
    axis.set_aspect("equal")
