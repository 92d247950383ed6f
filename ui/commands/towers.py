"""The command that looks into a vision tower and draws what it sees."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ui.commands.shared import fail, plain_errors, tell

PANEL = "Pretrain and measure"
commands = typer.Typer()


@commands.command(
    rich_help_panel=PANEL,
    epilog="Examples: kangaroo look facebook/dinov2-small dog.jpg cat.jpg --side 448 --among holiday   or   "
    "kangaroo look runs/dino/model birds --plot map.png",
)
def look(
    tower: Annotated[str, typer.Argument(help="A tower's folder or hub name.", show_default=False)],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Pictures, or with --plot one folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The sheet: .png, .svg or .pdf.")] = Path("look.png"),
    side: Annotated[int | None, typer.Option(min=32, help="Pixels of a side.", show_default="the tower's own")] = None,
    reconstruct: Annotated[
        bool | None,
        typer.Option(help="Hide patches and let MAE's decoder draw them.", show_default="where there is a decoder"),
    ] = None,
    among: Annotated[Path | None, typer.Option(help="Show the nearest neighbours in this folder.")] = None,
    count: Annotated[int, typer.Option(min=1, max=20, help="How many neighbours.")] = 6,
    plot: Annotated[Path | None, typer.Option(help="Draw a map of a folder's pictures into this file instead.")] = None,
    features: Annotated[
        Literal["pooled", "patches"], typer.Option(help="What is near is told by; patches is the mean over them.")
    ] = "pooled",
    seed: Annotated[int, typer.Option(min=0, help="Decides which patches are hidden, and how a map is laid.")] = 0,
) -> None:
    """Draw what a tower looks at, what its patches have in common, what it draws back, and what it finds alike."""
    written = plot or out
    if written.suffix not in (".png", ".svg", ".pdf") or not written.absolute().parent.is_dir():
        raise fail(f"{'--plot' if plot else '--out'} {written}: name a .png, .svg or .pdf file in a folder that exists")
    folders = [path for path in images if path.is_dir()]
    if plot and (len(images) != 1 or not folders):
        raise fail("--plot draws a map of one folder. Example: kangaroo look TOWER birds --plot map.png")
    if folders and not plot:
        raise fail(f"{folders[0]} is a folder: name pictures in it, or draw a map of it with --plot map.png")
    from assistant.images import PictureError
    from assistant.models import ModelError
    from training.evaluation import look as looking

    with plain_errors(ModelError, PictureError, ValueError):
        if plot:
            notes = looking.plot(tower, images[0], plot, features, seed)
        else:
            wanted = looking.Wanted(side, reconstruct, among, count, features, seed)
            notes = looking.look(tower, images, out, wanted)
    for note in notes:
        tell(note)
    print(f"see {written}")
