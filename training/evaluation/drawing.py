"""Draw what a tower looks at: pictures beside their attention maps, their patches as colours, and their neighbours."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

INCHES = 1.6  # of a picture on the sheet
DOTS_PER_INCH = 120


def draw_sheet(
    pictures: Tensor, names: Sequence[str], maps: Tensor | None, colours: Tensor, file: Path, others: Sequence[str] = ()
) -> None:
    """Write a sheet with a row for each picture: itself, its patches as colours, and the map of each head.

    Args:
        pictures: (B, 3, H, W) uint8.
        names: what stands beside each row.
        maps: (B, heads, rows, columns) from `attention_maps`; None where the tower has none.
        colours: (B, rows, columns, 3) from `patch_colours`.
        file: where it goes; its suffix decides the format (.png, .svg, .pdf).
        others: a line of words below each row, such as its neighbours.
    """
    heads = 0 if maps is None else maps.shape[1]
    columns = 2 + heads
    figure = Figure((INCHES * columns, (INCHES + 0.35) * len(pictures)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), columns, squeeze=False)
    for row, picture in enumerate(pictures):
        _show(axes[row][0], picture.permute(1, 2, 0), names[row])
        _show(axes[row][1], colours[row], "patches" if row == 0 else "")
        for head in range(heads):
            assert maps is not None
            _show(axes[row][2 + head], picture.permute(1, 2, 0), f"head {head + 1}" if row == 0 else "")
            height, width = picture.shape[-2:]
            smooth = functional.interpolate(maps[row, head][None, None], (height, width), mode="bilinear")
            axes[row][2 + head].imshow(smooth[0, 0].numpy(), cmap="inferno", alpha=0.7)
        if others:
            axes[row][0].set_xlabel(others[row], fontsize=6, loc="left")
    figure.savefig(file, dpi=DOTS_PER_INCH)


def _show(axis: object, picture: Tensor, title: str) -> None:
    axis.imshow(picture.numpy(), interpolation="nearest")  # type: ignore[attr-defined]
    axis.set_title(title, fontsize=7)  # type: ignore[attr-defined]
    axis.set_xticks([])  # type: ignore[attr-defined]
    axis.set_yticks([])  # type: ignore[attr-defined]
