"""Shows that what is small in a large picture is read with tiles: trains Joey with them and without, measures both.

Both learn to read first, in one stage that they share. Then both see the same generated pictures in the same order, for
as many steps, with the same settings; the one sees each picture in 160 x 160 pixels, the other in these and in tiles.
Measured on pictures that neither saw.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from assistant.answering import Assistant, Request
from training.config import InstructStage, Recipe, TowerStage, read_recipe, rehearsal
from training.data.scenes import EVALUATION_SEED, Question, Scene, SceneKind, make_scene
from training.evaluation.answers import Accuracy, accuracy
from training.evaluation.scorecard import answer_all
from training.evaluation.scores import wilson_interval
from training.recipe import DONE, run_recipe

RECIPE = "joey-tiles"
SIDE = 320  # pixels of the pictures, as in the recipe
ASKED: dict[SceneKind, str] = {"small word": "word", "small shape": "shape"}  # the kind of question for each
ANSWER_TOKENS = 4
BATCH = 16
SQUARES = "squares"  # the stage of the arm without tiles, beside the other's in one folder


@dataclass(frozen=True)
class Read:
    """How much of one kind was read, with the 95 % interval of its share."""

    accuracy: Accuracy
    interval: tuple[float, float]


@dataclass(frozen=True)
class Arm:
    """How one of the models came about, and what it read."""

    name: str
    read: dict[SceneKind, Read]
    largest_picture: int  # tokens
    seconds: float | None  # of training; None where nothing was trained


def asked_about(kind: SceneKind, count: int) -> list[tuple[Scene, Question]]:
    """Pictures of `kind` that nobody trains on, each with the question for what is small in it."""
    found: list[tuple[Scene, Question]] = []
    seed = EVALUATION_SEED
    while len(found) < count:
        scene = make_scene(seed, SIDE, kind)
        plain = (one for one in scene.questions if one.kind == ASKED[kind] and not one.choices)
        found += [(scene, question) for question in plain][:1]
        seed += 1
    return found


def measured(name: str, assistant: Assistant, count: int, seconds: float | None = None) -> Arm:
    """What `assistant` reads of `count` unseen pictures of each kind, asked in words that training uses."""
    read: dict[SceneKind, Read] = {}
    for kind in ASKED:
        asked = asked_about(kind, count)
        requests = [Request(question.question, (scene.image,)) for scene, question in asked]
        given = answer_all(assistant, requests, f"{name}: {kind}", ANSWER_TOKENS, BATCH)
        right = accuracy(given, [question.answer for _, question in asked])
        read[kind] = Read(right, wilson_interval(right.right, right.questions))
    image = assistant.processor(images=[asked[0][0].image], text="<image>")["input_ids"][0]
    tokens = list(image).count(assistant.processor.image_token_id)
    return Arm(name, read, tokens, seconds)


def without_tiles(recipe: Recipe) -> Recipe:
    """The same recipe, whose model goes on seeing squares."""
    stages = tuple(
        stage.model_copy(update={"tiles": (), "name": SQUARES}) if stage.name == recipe.publish else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"stages": stages, "publish": SQUARES})


def changed(recipe: Recipe, start_from: str | None, steps: int | None, batch: int | None) -> Recipe:
    """The recipe on another model, or with another number or size of steps, where they are said."""
    said: dict[str, Any] = {"steps": steps, "batch_size": batch}
    stages, made = [], {stage.name for stage in recipe.stages}
    for stage in recipe.stages:
        assert isinstance(stage, TowerStage | InstructStage)
        schedule = stage.schedule.model_copy(update={name: value for name, value in said.items() if value})
        start = {"start_from": start_from} if start_from and stage.start_from not in made else {}
        stages.append(stage.model_copy(update={"schedule": schedule} | start))
    return recipe.model_copy(update={"stages": tuple(stages)})


def trained(recipe: Recipe, runs: Path) -> tuple[Assistant, float]:
    """What comes of `recipe`, and the seconds that its stages took; what is finished is not run again."""
    model = run_recipe(recipe, None, runs)
    markers = [runs / recipe.name / stage.name / DONE for stage in recipe.stages]
    return Assistant.load(model), sum(json.loads(marker.read_text())["seconds"] for marker in markers)


def draw(arms: Sequence[Arm], scene: Scene, file: Path) -> None:
    """One of the pictures as both see it, and what each of the models reads."""
    figure = Figure(figsize=(12, 4), layout="tight")
    large, small, bars = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    large.imshow(scene.image)
    large.set_title("with tiles: 320 x 320 pixels")
    small.imshow(scene.image.reduce(SIDE // 160))
    small.set_title("without: 160 x 160")
    for picture in (large, small):
        picture.axis("off")
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        shares = [100 * read.accuracy.right for read in arm.read.values()]
        ends = [[100 * end for end in read.interval] for read in arm.read.values()]
        beyond = [[share - low for share, (low, _) in zip(shares, ends, strict=True)]]
        beyond += [[high - share for share, (_, high) in zip(shares, ends, strict=True)]]
        places = [place + number * width for place in range(len(shares))]
        bars.bar(places, shares, width, yerr=beyond, capsize=3, label=arm.name)
    bars.set_xticks([place + width for place in range(len(ASKED))], list(ASKED))
    bars.set_ylabel("right, %")
    bars.set_ylim(0, 100)
    bars.legend()
    FigureCanvasAgg(figure).print_png(file)


def table_of(arms: Sequence[Arm]) -> Table:
    """What each read, in percent."""
    table = Table("model", "trained", "tokens of a picture", "what", "right", "95 % interval", "commonest answer")
    for arm in arms:
        took = "no" if arm.seconds is None else f"{arm.seconds:.0f} s"
        for kind, read in arm.read.items():
            low, high = read.interval
            shares = f"{100 * read.accuracy.right:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
            guess = f"{100 * read.accuracy.majority:.1f}"
            table.add_row(arm.name, took, str(arm.largest_picture), kind, *shares, guess)
    return table


def main(
    out: Annotated[Path, typer.Option(help="Where runs, scores and the picture go.")] = Path("runs/tiles"),
    unseen: Annotated[int, typer.Option(min=2, help="Pictures of each kind that tell what was learned.")] = 300,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each.", show_default="the recipe's")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures of a step.", show_default="the recipe's")] = None,
    start_from: Annotated[str | None, typer.Option(help="Another model than Joey.", show_default="joey")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Two tiny steps of each: does all of it run?")] = False,
) -> None:
    """Train with tiles and without, read unseen pictures with both and with the model before, and write what came."""
    recipe = changed(read_recipe(RECIPE), start_from, steps, batch)
    recipe = rehearsal(recipe) if rehearse else recipe
    start = next(stage.start_from for stage in recipe.stages if isinstance(stage, InstructStage))
    arms = [measured("before", Assistant.load(start), unseen)]
    for name, one in (("without tiles", without_tiles(recipe)), ("with tiles", recipe)):
        assistant, seconds = trained(one, out)
        arms.append(measured(name, assistant, unseen, seconds))
    report = {"recipe": recipe.model_dump(mode="json"), "arms": [asdict(arm) for arm in arms]}
    (out / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(arms, asked_about("small word", 1)[0][0], out / "tiles.png")
    Console().print(table_of(arms))


if __name__ == "__main__":
    typer.run(main)
