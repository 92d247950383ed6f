"""Commands between a tower and a taught assistant: join, align, tune, and a look at the data."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ui.commands.shared import GOES_ON, ModelArgument, ModelOption, fail, plain_errors, stopping, tell

PANEL = "Teach"
commands = typer.Typer()


data_app = typer.Typer(name="data", help="Look after data for teaching.", no_args_is_help=True)
commands.add_typer(data_app, rich_help_panel=PANEL)


@commands.command(
    rich_help_panel=PANEL,
    epilog="Examples: kangaroo join openai/clip-vit-large-patch14-336 lmsys/vicuna-7b-v1.5 --out llava   or   "
    "kangaroo join llava --tiles 1x2,2x1,2x2 --out llava-tiles",
)
def join(
    tower: Annotated[
        str,
        typer.Argument(
            help="A CLIP, SigLIP or DINOv2: a folder or a hub name. With --tiles and no LLM, a whole LLaVA.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the joined model.")],
    language_model: Annotated[
        str | None, typer.Argument(metavar="[LLM]", help="A Llama, Vicuna, Mistral or Qwen.", show_default=False)
    ] = None,
    projector: Annotated[
        Literal["linear", "mlp", "pixel-shuffle"],
        typer.Option(help="What stands between them; pixel-shuffle makes one token of 2 x 2 patches."),
    ] = "mlp",
    tiles: Annotated[
        str | None,
        typer.Option(
            help="Cut large pictures into tiles, as LLaVA-NeXT: the grids, rows x columns, such as 1x2,2x1,2x2.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Join a vision tower and a language model with a new projector. It has to be aligned before it makes sense.

    With --tiles the model sees a large picture whole and in tiles of the tower's own size, to read what is small in it.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise fail(f"--out {out}: there is something already; name a new folder")
    grids = grids_said(tiles)
    if language_model is None and not grids:
        raise fail("name the language model that joins the tower, or the --tiles that a whole LLaVA shall be given")
    from assistant.models import ModelError
    from training.joining import join_models, tile_model

    with plain_errors(ModelError, ValueError):
        if language_model is None:
            most = tile_model(tower, grids, out)
            print(f"A picture is up to {most:,} tokens now, by its size.")
            print(f"The model is in {out}. Its language model never saw tiles: kangaroo tune {out} --full --data FILE")
            return
        joined = join_models(tower, language_model, out, projector, grids)
    print(
        f"{joined.tower} and {joined.language_model}, {joined.weights:,} weights, of these {joined.trained_weights:,} "
        f"in the new {projector} projector; a picture is {'up to ' * bool(grids)}{joined.tokens_per_picture} tokens."
    )
    print(f"The model is in {out}. Its projector says nothing yet: kangaroo align {out} --data FILE")


def grids_said(tiles: str | None) -> list[tuple[int, int]]:
    """The grids of `--tiles`, rows and columns each; none where it is not said."""
    if tiles is None:
        return []
    found = [re.fullmatch(r"\s*([1-9]\d?)\s*x\s*([1-9]\d?)\s*", grid) for grid in tiles.split(",")]
    if not all(found):
        raise fail(f"--tiles {tiles}: write grids as rows x columns with commas between them, such as 1x2,2x1,2x2")
    return [(int(grid[1]), int(grid[2])) for grid in found if grid]


DataOption = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Conversations: JSON, JSONL, CSV, Parquet, or a dataset of the hub. See: kangaroo data check",
    ),
]
PicturesOption = Annotated[
    str | None, typer.Option(help="Folder that the file's paths of pictures count from.", show_default="the file's")
]
DownloadsOption = Annotated[
    bool, typer.Option("--allow-downloads", help="Fetch pictures that are https addresses, and keep them.")
]
PathsOption = Annotated[
    bool, typer.Option(help="Open pictures that rows name. Say --no-paths for data of people you do not know.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimiser steps.", show_default="3 epochs")]
EpochsOption = Annotated[float | None, typer.Option(min=0.01, help="How often each row is seen.", show_default="3")]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Lessons of a step.", show_default="8")]
RateOption = Annotated[
    float | None, typer.Option("--rate", min=0, help="Highest learning rate.", show_default="LLaVA-1.5's, by width")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Stop after the table of what would happen.")]
RehearseOption = Annotated[bool, typer.Option(help="Try two steps from end to end before the run.")]
ReportOption = Annotated[
    bool, typer.Option(help="Ask the models before and after, and write the model's card with what they answer.")
]
HeldOutOption = Annotated[
    str | None,
    typer.Option(
        "--held-out", metavar="FILE", show_default="some of --data",
        help="Conversations to validate on; all of --data is trained on then.",
    ),
]  # fmt: skip
ReplayOption = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of generated scenes among the lessons, against forgetting.")
]


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo align llava --data captions.csv")
def align(
    data: DataOption,
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints and the model go.")] = Path("runs/align"),
    pictures: PicturesOption = None,
    downloads: DownloadsOption = False,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    rate: RateOption = None,
    dry_run: DryRunOption = False,
    rehearsal: RehearseOption = True,
    report: ReportOption = True,
) -> None:
    """Teach the projector of a joined model, and nothing else, what pictures look like to its language model."""
    asked = {"model": model, "data": data, "out": out, "pictures": pictures, "downloads": downloads}
    size = {"steps": steps, "epochs": epochs, "batch_size": batch, "learning_rate": rate}
    run_teaching(dry_run, rehearsal, report, mode="align", **asked, **size)


@commands.command(
    rich_help_panel=PANEL,
    epilog="Example: kangaroo tune --data questions.csv    (teaches Joey; a csv of image, question, answer)",
)
def tune(
    data: DataOption,
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints and the model go.")] = Path("runs/tune"),
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter of the language model (the default).")] = False,
    qlora: Annotated[bool, typer.Option("--qlora", help="The same, with the language model held in 4 bits.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Train projector and language model whole.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, max=512, help="Rank of the adapter.", show_default="16")] = None,
    pictures: PicturesOption = None,
    downloads: DownloadsOption = False,
    steps: StepsOption = None,
    epochs: EpochsOption = None,
    batch: BatchOption = None,
    rate: RateOption = None,
    rate_times: Annotated[float, typer.Option(min=0.001, help="Times the learning rate, usual or said.")] = 1.0,
    replay: ReplayOption = 0.0,
    held_out: HeldOutOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 1,
    paths: PathsOption = True,
    dry_run: DryRunOption = False,
    rehearsal: RehearseOption = True,
    report: ReportOption = True,
) -> None:
    """Teach a model your own questions and answers about pictures; run it again to go on where it stopped."""
    if lora + qlora + full > 1:
        raise fail("say one of --lora, --qlora and --full")
    if full and rank is not None:
        raise fail("--rank is the adapter's, and --full trains none")
    mode = "full" if full else "qlora" if qlora else "lora"
    asked = {"model": model, "data": data, "out": out, "pictures": pictures, "downloads": downloads}
    size = {"steps": steps, "epochs": epochs, "batch_size": batch, "learning_rate": rate, "rank": rank}
    size |= {"rate_times": rate_times, "replay": replay, "seed": seed}
    run_teaching(dry_run, rehearsal, report, mode=mode, held_out=held_out, paths=paths, **asked, **size)


def run_teaching(dry_run: bool, rehearsal: bool, report: bool, **wish: Any) -> None:
    """Says what will happen, tries it, does it, and says what came of it. `wish` is what `Wish` says."""
    from rich.console import Console

    from assistant.models import ModelError
    from training.config import RecipeError
    from training.data.pictures import DataError
    from training.ranks import met
    from training.teaching import Wish, plan_of, rehearse, teach, teaching_recipe
    from training.teaching_plan import plan_table
    from training.teaching_report import report_teaching

    runs = wish["out"].absolute().parent
    speaks = met().is_main_process  # one of several processes speaks for all
    with plain_errors(RecipeError, DataError, ModelError):
        recipe = teaching_recipe(Wish(**wish))
        Console(quiet=not speaks).print(plan_table(plan_of(recipe, runs)))
        if dry_run:
            return
        with stopping(GOES_ON):
            if rehearsal:
                if speaks:
                    tell("rehearsing two steps ...")
                rehearse(recipe, runs)
            model = teach(recipe, runs)
    if not speaks:
        return
    print(f"The model is in {model}. Chat with it: kangaroo chat {model}")
    if (model / "adapter").is_dir():
        print(f"Its adapter alone, for peft and vLLM: {model / 'adapter'}")
    if report:
        said = "stopped. The model is finished; the same command makes its report."
        with plain_errors(RecipeError, DataError, ModelError), stopping(said):
            report_teaching(recipe, runs, Console())


@data_app.command(
    "check",
    epilog="Examples: kangaroo data check lessons.json --page report.html   or   "
    "kangaroo data check train.jsonl held-out.jsonl --pictures photos --strict",
)
def check_data(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Conversations: LLaVA or ShareGPT JSON, messages as JSON lines, CSV, Parquet, a dataset's folder or "
            "its name on the hub.",
            show_default=False,
        ),
    ],
    held_out: Annotated[
        str | None,
        typer.Argument(
            metavar="[HELD_OUT]", help="Held-out data: checked too, and compared with the first.", show_default=False
        ),
    ] = None,
    model: ModelOption = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="The folder that paths of pictures count from.", show_default="the file's own"),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write a report to look at, with pictures: an .html file.")] = None,
    fixed: Annotated[
        Path | None, typer.Option(help="Write the good rows in one form: a .jsonl file; the others go beside it.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail for one bad row; training skips one in 100.")] = False,
    longest: Annotated[
        int | None, typer.Option(min=16, help="Most tokens of a row.", show_default="as many as the model reads")
    ] = None,
    show: Annotated[int, typer.Option(min=0, max=50, help="How many rows are shown as the model reads them.")] = 3,
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    downloads: DownloadsOption = False,
    paths: PathsOption = True,
    as_json: Annotated[bool, typer.Option("--json", help="Say all of it as one line of JSON, for programs.")] = False,
) -> None:
    """Check data for teaching before any training; exit code 1 when training would stop.

    Reads every row, decodes every picture to its end, and puts every answer into the model's template.

    What format the data is in, it says itself. Each fault is told with its row, its field, and the way out.
    """
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        raise fail(f"--page {page}: name an .html file in a folder that exists")
    if fixed is not None and (fixed.exists() or not fixed.absolute().parent.is_dir()):
        raise fail(f"--fixed {fixed}: name a new .jsonl file in a folder that exists")
    if pictures is not None and not pictures.is_dir():
        raise fail(f"--pictures {pictures}: there is no such folder")
    from rich.console import Console

    from assistant.models import ModelError
    from training.data.check_run import Wanted, run_check
    from training.data.pictures import DataError

    sources = [file] if held_out is None else [file, held_out]
    wanted = Wanted(sources, model, pictures, split, longest, downloads, strict, show, page, fixed, paths, as_json)
    with plain_errors(ModelError, DataError), stopping("stopped; nothing was written."):
        stops = run_check(wanted, Console())
    raise typer.Exit(1 if stops else 0)
