"""Commands that train by a recipe, and that plan a larger run."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from ui.commands.shared import GOES_ON, fail, plain_errors, stopping

PANEL = "Pretrain and measure"
OF_RUNS, OF_RECIPE, OF_SERVING = (
    "With RUNS",
    "With --recipe",
    "With --serve",
)  # how the options of `plan` stand together
RECIPE = ".yaml"
SHIPPED = sorted(
    file.name.removesuffix(RECIPE)
    for file in files("training").joinpath("recipes").iterdir()
    if file.name.endswith(RECIPE)
)
commands = typer.Typer()


@commands.command(
    rich_help_panel=PANEL,
    epilog="Examples: kangaroo train scenes    (needs no data)   or   kangaroo train dino --data pictures/",
)
def train(
    recipe: Annotated[
        str, typer.Argument(help=f"A .yaml file, or a shipped recipe: {', '.join(SHIPPED)}.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="KANGAROO_DATA",
            help="A folder of pictures (clip, siglip: with captions.jsonl), or of the shards that the recipe names.",
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where stages, checkpoints and the result go.")] = Path("runs"),
    stage: Annotated[str | None, typer.Option(help="Run this stage alone, on what those before it left.")] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Two tiny steps of each stage, to see that all fits together.")
    ] = False,
) -> None:
    """Train a model by a recipe, stage after stage; run it again to go on where it stopped."""
    from accelerate import PartialState

    from training.config import InstructStage, RecipeError, read_recipe, rehearsal
    from training.data.pictures import DataError
    from training.recipe import run_recipe

    with plain_errors(RecipeError, DataError):
        read = read_recipe(recipe)
        with stopping(GOES_ON):
            result = run_recipe(rehearsal(read) if rehearse else read, data, runs, stage)
    answers = isinstance(read.stages[-1], InstructStage) and stage is None
    # One of several processes speaks for all.
    PartialState().print(f"The result is in {result}. Try it: kangaroo {'chat' if answers else 'evaluate'} {result}")


@commands.command(
    rich_help_panel=PANEL,
    epilog="Examples: kangaroo plan runs/small runs/medium runs/large more.csv   or   "
    "kangaroo plan --recipe dinov2 --devices 512 --memory 80GB --link 50GB/s   or   kangaroo plan --serve llava",
)
def plan(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUNS]...",
            help="Finished runs of several sizes: folders that train left, or a .csv with the columns parameters, "
            "samples (or tokens) and loss.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="FLOPs to spend best, such as 1e21.", show_default="1 to 100 times", rich_help_panel=OF_RUNS
        ),
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(min=1.0, help="Forecast a run of this size.", rich_help_panel=OF_RUNS)
    ] = None,
    samples: Annotated[
        float | None, typer.Option(min=1.0, help="Samples (or tokens) of that run.", rich_help_panel=OF_RUNS)
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE[:STAGE]",
            help="Say what this recipe costs on many GPUs. Given more than once, they are compared.",
            rich_help_panel=OF_RECIPE,
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many GPUs.", rich_help_panel=OF_RECIPE)] = 8,
    per_machine: Annotated[int, typer.Option(min=1, help="GPUs of one machine.", rich_help_panel=OF_RECIPE)] = 8,
    memory: Annotated[str, typer.Option(help="Memory of one GPU.", rich_help_panel=OF_RECIPE)] = "80GB",
    link: Annotated[
        str, typer.Option(help="What one GPU sends; 400Gb/s is 50GB/s.", rich_help_panel=OF_RECIPE)
    ] = "50GB/s",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Samples of a step in all.", show_default="the recipe's on each GPU", rich_help_panel=OF_RECIPE
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of the run.", show_default="for as many samples", rich_help_panel=OF_RECIPE),
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Without bf16.", rich_help_panel=OF_RECIPE)] = False,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Say how much of this model --devices serve at most: a folder or a hub name, of which the "
            "configuration alone is read.",
            rich_help_panel=OF_SERVING,
        ),
    ] = None,
    bandwidth: Annotated[
        str, typer.Option(help="What one GPU reads of its memory.", rich_help_panel=OF_SERVING)
    ] = "3350GB/s",
    teraflops: Annotated[
        float, typer.Option(min=0.001, help="What one GPU computes a second in bf16.", rich_help_panel=OF_SERVING)
    ] = 989.0,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a request.", show_default="a picture's, and 320", rich_help_panel=OF_SERVING
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for curves, numbers and the recipe to launch.")] = Path("plan"),
) -> None:
    """Plan a larger run: what small runs say of the next size, what a recipe costs on many GPUs, what those serve.

    With RUNS: fits scaling laws to your own runs and says how sure they are. Six are the least, of three sizes.

    With --recipe: memory, bytes sent, batch and rate for it, and the commands that launch it.

    With --serve: for each way to split --devices into engines, what fits, how fast it writes, and vLLM's flags.
    """
    if bool(runs) + bool(recipe) + bool(serve) != 1:
        raise fail("name finished runs, or a recipe with --recipe, or a model with --serve; see kangaroo plan --help")
    if (parameters is None) != (samples is None):
        raise fail("--parameters and --samples go together: both or neither")
    if out.exists() and not out.is_dir():
        raise fail(f"--out {out} is a file: name a folder")
    from rich.console import Console

    from training.config import RecipeError
    from training.data.pictures import DataError

    with plain_errors(RecipeError, DataError), stopping("stopped; nothing was written."):
        if serve:
            from training.planning.serving import report_serving

            report_serving(serve, devices, per_machine, memory, bandwidth, teraflops, tokens, Console())
        elif recipe:
            from training.planning.costs_report import Wanted, report_costs
            from training.planning.overview import report_overview

            wanted = [Wanted(one, devices, memory, link, per_machine, batch, steps, fp32) for one in recipe]
            if len(wanted) == 1:
                report_costs(wanted[0], Path("runs"), out, Console())
            else:
                report_overview(wanted, Path("runs"), Console())
        else:
            from training.planning.runs_report import report_runs

            asked = None if parameters is None or samples is None else (parameters, samples)
            report_runs(runs or [], out, Console(), budget, asked)
