"""Commands behind tuning: prefer the better of two answers, judge answers, and learn from answers that are tried."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ui.commands.shared import GOES_ON, ModelArgument, fail, plain_errors, stopping, tell
from ui.commands.teaching import (
    PANEL,
    DownloadsOption,
    DryRunOption,
    PicturesOption,
    RateOption,
    RehearseOption,
    ReportOption,
)

commands = typer.Typer()

PairsOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Pairs: image, question, chosen and rejected as CSV, JSONL or Parquet, or preferences as OpenAI's.",
        show_default="generated scenes",
    ),
]
CaptionsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Make pairs from a file of captions (.jsonl or .csv): each picture's own against another one's.",
        exists=True,
        dir_okay=False,
    ),
]
StepsOption = Annotated[
    int | None, typer.Option(min=1, help="Optimiser steps.", show_default="3 epochs; 300 on scenes")
]
BatchOption = Annotated[int | None, typer.Option(min=1, help="Pairs of a step.", show_default="8")]
RankOption = Annotated[int | None, typer.Option(min=1, max=512, help="Rank of the adapter.", show_default="16")]


@commands.command(
    rich_help_panel=PANEL,
    epilog="Examples: kangaroo prefer    (Joey, on generated scenes)   or   kangaroo prefer llava --data pairs.jsonl",
)
def prefer(
    model: ModelArgument = None,
    data: PairsOption = None,
    captions: CaptionsOption = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints and the model go.")] = Path("runs/prefer"),
    pictures: PicturesOption = None,
    downloads: DownloadsOption = False,
    beta: Annotated[
        float | None, typer.Option(min=1e-4, help="How dear it is to leave what it was.", show_default="0.1")
    ] = None,
    imitation: Annotated[
        float, typer.Option(min=0, help="Weight of plainly learning the better answer beside.", show_default="0")
    ] = 0.0,
    steps: StepsOption = None,
    batch: BatchOption = None,
    rate: RateOption = None,
    rank: RankOption = None,
    dry_run: DryRunOption = False,
    rehearsal: RehearseOption = True,
    report: ReportOption = True,
) -> None:
    """Teach a model to prefer the better of two answers (DPO), against what it imagines; run it again to go on.

    Without data, pairs are made from generated scenes: what is true of the picture against what is not in it.
    """
    asked = {"model": model, "data": data, "captions": captions, "pictures": pictures, "downloads": downloads}
    size = {"steps": steps, "batch_size": batch, "learning_rate": rate, "rank": rank}
    run_after_tuning(
        dry_run, rehearsal, report, kind="preference", out=out, beta=beta, imitation=imitation, **asked, **size
    )


@commands.command(rich_help_panel=PANEL, epilog="Example: kangaroo reward --data pairs.jsonl")
def reward(
    model: ModelArgument = None,
    data: PairsOption = None,
    captions: CaptionsOption = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints and the judge go.")] = Path("runs/reward"),
    pictures: PicturesOption = None,
    downloads: DownloadsOption = False,
    steps: StepsOption = None,
    batch: BatchOption = None,
    rate: RateOption = None,
    rank: RankOption = None,
    dry_run: DryRunOption = False,
    rehearsal: RehearseOption = True,
) -> None:
    """Train a judge of answers on such pairs: a copy of the model that gives the better answer a higher number."""
    asked = {"model": model, "data": data, "captions": captions, "pictures": pictures, "downloads": downloads}
    size = {"steps": steps, "batch_size": batch, "learning_rate": rate, "rank": rank}
    run_after_tuning(dry_run, rehearsal, False, kind="reward", out=out, **asked, **size)


@commands.command(
    rich_help_panel=PANEL, epilog="Example: kangaroo reinforce --scenes count --ask count    (Joey learns to count)"
)
def reinforce(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints and the model go.")] = Path("runs/reinforce"),
    scenes: Annotated[
        str | None, typer.Option(help="Kinds of scenes, such as count,position.", show_default="all")
    ] = None,
    ask: Annotated[
        str | None, typer.Option(help="Kinds of questions, such as count,yes_no.", show_default="all")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Pay with the numbers of a judge that `kangaroo reward` trained.",
            show_default="1 for the right answer",
        ),
    ] = None,
    answers: Annotated[int, typer.Option(min=2, help="Answers that are tried for each question.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.1, help="Higher tries more unlikely answers.")] = 1.0,
    beta: Annotated[
        float | None, typer.Option(min=0, help="Price of leaving what it was (KL).", show_default="0.02")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.", show_default="200")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Questions of a step.", show_default="8")] = None,
    rate: RateOption = None,
    rank: RankOption = None,
    dry_run: DryRunOption = False,
    rehearsal: RehearseOption = True,
    report: ReportOption = True,
) -> None:
    """Let a model try answers to questions about generated scenes, and make the right ones likelier (GRPO).

    The reward is verifiable: 1 where an answer equals the right one, else 0; or what a judge says. Run it again to go
    on.
    """
    tried = {"answers": answers, "temperature": temperature, "beta": beta}
    asked = {"scene_kinds": _listed(scenes), "questions": _listed(ask), "judge": judge}
    size = {"steps": steps, "batch_size": batch, "learning_rate": rate, "rank": rank}
    run_after_tuning(dry_run, rehearsal, report, kind="reinforce", model=model, out=out, **asked, **tried, **size)


def _listed(names: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (names or "").split(",") if name.strip())


def run_after_tuning(dry_run: bool, rehearsal: bool, report: bool, **wish: Any) -> None:
    """Says what will happen, tries it, does it, and says what came of it. `wish` is what `AfterWish` says."""
    from pydantic import ValidationError
    from rich.console import Console

    from assistant.models import ModelError
    from training.after_tuning_plan import plan_of
    from training.after_tuning_report import report_after_tuning
    from training.after_tuning_wish import AfterWish, after_tuning_recipe
    from training.config import RecipeError
    from training.data.pictures import DataError
    from training.preference_stages import RewardStage
    from training.recipe import DONE
    from training.strict import faults_in
    from training.teaching import rehearse, teach
    from training.teaching_plan import plan_table

    runs = wish["out"].absolute().parent
    with plain_errors(RecipeError, DataError, ModelError):
        try:
            recipe = after_tuning_recipe(AfterWish(**wish))
        except ValidationError as error:
            raise fail(faults_in(error, "the stage")) from error
        Console().print(plan_table(plan_of(recipe, runs)))
        if dry_run:
            return
        with stopping(GOES_ON):
            if rehearsal:
                tell("rehearsing two steps ...")
                rehearse(recipe, runs)
            model = teach(recipe, runs)
        print(f"The model is in {model}; its adapter alone, for peft and vLLM: {model / 'adapter'}")
        if isinstance(recipe.stages[0], RewardStage):
            print(ranks(runs / recipe.name / recipe.stages[0].name / DONE))
        if report:
            with stopping("stopped. The model is finished; the same command makes its report."):
                report_after_tuning(recipe, runs, Console())


def ranks(done: Path) -> str:
    """How well a judge ranks held-out pairs, now and before it was trained, as the file of its finished stage says."""
    scores = json.loads(done.read_text())["scores"]
    now, before = (100 * scores[name] for name in ("ranked_right", "ranked_right_before"))
    return f"It ranks {now:.1f} % of the held-out pairs rightly; before it was trained {before:.1f} %."
