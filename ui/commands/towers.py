"""Commands that look into a vision tower: scores, and pictures of what it sees."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ui.commands.shared import fail, plain_errors, stopping, tell

PANEL = "Pretrain and measure"
commands = typer.Typer()


@commands.command(
    rich_help_panel=PANEL, epilog="Example: kangaroo evaluate runs/dino/model --train birds/train --test birds/test"
)
def evaluate(
    tower: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOWER]", help="A tower's folder or hub name (organisation/name).", show_default="Joey's embedder"
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Labelled pictures to learn from: a folder of labels' folders, or a shard."),
    ] = None,
    test: Annotated[str | None, typer.Option(metavar="DATA", help="Labelled pictures to name.")] = None,
    pairs: Annotated[
        str | None, typer.Option(metavar="DATA", help="Pictures with captions: a .jsonl or .csv file, or a shard.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(envvar="KANGAROO_DATA", help="The folder of the Parquet shards that are named.")
    ] = None,
    features: Annotated[
        Literal["pooled", "patches", "both"], typer.Option(help="What probes read; patches is the mean over them.")
    ] = "pooled",
    neighbours: Annotated[int, typer.Option(min=1, help="How many neighbours vote in kNN.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Pictures that the tower sees at once.")] = 64,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the tower in bfloat16 autocast.")] = False,
    shots: Annotated[
        str | None,
        typer.Option(help="Probe with so few pictures of each label too, drawn five times. Example: 1,5,10"),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="Wordings for zero-shot beside the usual ones: a file, one a line, {} where the label goes."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report into this file too, as JSON.")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write a page for the browser into this file: confusions, neighbours, hits.")
    ] = None,
    features_folder: Annotated[
        Path | None,
        typer.Option(
            envvar="KANGAROO_FEATURES",
            help="Where features are kept, so that the same pictures never go through the same tower twice.",
            show_default="~/.cache/kangaroo/features",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep features, and use those that were kept.")] = True,
) -> None:
    """Measure a vision tower: kNN and linear probes, and with a text half naming without examples and retrieval."""
    for option, file in (("--out", out), ("--page", page)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise fail(f"{option} {file}: name a file in a folder that exists")
    few = read_shots(shots) if shots is not None else ()
    from rich.console import Console

    from assistant.models import EMBEDDER, JOEY, ModelError
    from training.data.pictures import DataError
    from training.evaluation.feature_store import default_folder
    from training.evaluation.picture_data import read_templates
    from training.evaluation.tower_page import tower_page
    from training.evaluation.tower_report import Wanted, examine_tower, report_table, said_of_reuse

    kept = (features_folder or default_folder()) if keep else None
    with plain_errors(ModelError, DataError):
        wording = read_templates(templates) if templates else ()
        wanted = Wanted(train, test, pairs, features, neighbours, batch, bf16, few, wording)
        with stopping(
            "stopped." + (" The features so far are kept: the same command goes on from there." if keep else "")
        ):
            findings = examine_tower(tower or JOEY / EMBEDDER, wanted, data, kept)
    for line in (*findings.report["notes"], *said_of_reuse(findings.report)):
        tell(line)
    Console().print(report_table(findings.report))
    if out is not None:
        out.write_text(json.dumps(findings.report, indent=2) + "\n")
    if page is not None:
        page.write_text(tower_page(findings), encoding="utf-8", errors="xmlcharrefreplace")
        print(f"see {page}")


def read_shots(given: str) -> tuple[int, ...]:
    """The numbers in `1,5,10`, rising; ends the command where they are none."""
    try:
        shots = sorted({int(number) for number in given.split(",")})
    except ValueError:
        shots = [0]
    if shots[0] < 1:
        raise fail(f"--shots {given}: numbers of pictures with commas between them. Example: --shots 1,5,10")
    return tuple(shots)


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
