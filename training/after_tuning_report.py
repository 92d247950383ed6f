"""Compare a model with what it was before it learned to prefer or was reinforced, on scenes that it never saw."""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from assistant.answering import Assistant, Request
from assistant.models import JOEY
from assistant.questions import CAPTION_QUESTION
from assistant.tower_shapes import output_side
from training.config import Recipe, RecipeError
from training.data.preference_scenes import imagined_names
from training.data.scenes import EVALUATION_SEED, Scene, SceneKind, kind_of, make_scene
from training.evaluation.answers import normalised
from training.evaluation.scorecard import ANSWER_TOKENS, CAPTION_TOKENS, answer_all
from training.evaluation.scores import wilson_interval
from training.preference_stages import ReinforceStage
from training.stages import Workshop
from training.teaching_card import COLUMNS, Change, Share
from training.teaching_questions import scene_questions
from training.teaching_report import said_yes

REPORT = "report.json"
CAPTIONED = 150  # scenes whose captions are read for names
ASKED = 200  # questions of the sort that was reinforced
BATCH = 32


@dataclass(frozen=True)
class Measured:
    """What one model says: shares, and of how many answers or names each is."""

    known: tuple[float, int]  # right answers about scenes, of every kind as many
    absent: tuple[float, int]  # yes to what is not in the scene
    imagined: tuple[float, int]  # names in captions of what is not there (CHAIR_i)
    asked: tuple[float, int] | None  # right answers to the questions that were reinforced


LINES = {
    "asked": "right answers to the sort of questions that was reinforced",
    "known": "right answers about generated scenes",
    "absent": "said yes to what is not in the scene, lower is better",
    "imagined": "names in captions of what is not in the scene, lower is better",
}


def report_after_tuning(recipe: Recipe, runs: Path, console: Console) -> tuple[Change, ...]:
    """Ask the models before and after, print the table, and write report.json into the model's folder.

    Raises RecipeError where the recipe has no such stage, and ModelError where a model is damaged.
    """
    stage, workshop = recipe.stages[0], Workshop(runs / recipe.name, None)
    if len(recipe.stages) != 1 or not hasattr(stage, "start_from"):
        raise RecipeError(f"{recipe.name}: only a recipe of one stage with start_from has a before and after")
    start = JOEY if stage.start_from is None else workshop.named(stage.start_from)
    model = workshop.runs / "model"
    after = measured(Assistant.load(model), recipe, "after")
    gc.collect()  # a large model has to be gone before the next one comes
    before = measured(Assistant.load(start), recipe, "before")
    changes = compared(before, after)
    (model / REPORT).write_text(json.dumps([asdict(change) for change in changes], indent=2) + "\n")
    console.print(table_of(changes))
    return changes


def measured(assistant: Assistant, recipe: Recipe, what: str) -> Measured:
    """What `assistant` answers, greedily; `what` stands before the bars."""
    known, absent = scene_questions()
    given = [
        answer_all(
            assistant,
            [Request(one.question.question, (one.picture,)) for one in some],
            f"{what}: {name}",
            ANSWER_TOKENS,
            BATCH,
        )
        for name, some in (("generated scenes", known), ("what is not there", absent))
    ]
    right = share_right(given[0], [one.question.answer for one in known])
    imagined = imagined_by(assistant, what)
    stage = recipe.stages[0]
    asked = asked_again(assistant, stage, what) if isinstance(stage, ReinforceStage) else None
    return Measured((right, len(known)), (said_yes(given[1]), len(absent)), imagined, asked)


def share_right(given: Sequence[str], expected: Sequence[str]) -> float:
    """The share of answers that equal the expected one, as `training.evaluation.answers` judges."""
    return sum(normalised(a) == normalised(b) for a, b in zip(given, expected, strict=True)) / len(expected)


def imagined_by(assistant: Assistant, what: str) -> tuple[float, int]:
    """The share of the colours and shapes that captions of scenes name and that are not there, and of how many."""
    scenes = scenes_of_objects(CAPTIONED)
    requests = [Request(CAPTION_QUESTION, (scene.image,)) for scene in scenes]
    captions = answer_all(assistant, requests, f"{what}: captions", CAPTION_TOKENS, BATCH)
    counts = [imagined_names(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    named = sum(all_ for all_, _ in counts)
    return (sum(absent for _, absent in counts) / named if named else 0.0), named


def scenes_of_objects(count: int) -> list[Scene]:
    """Scenes of shapes that nobody trains on; always the same."""
    kinds: tuple[SceneKind, ...] = ("shapes", "count", "position", "size")
    return [make_scene(EVALUATION_SEED + place, kind=kind_of(place, kinds)) for place in range(count)]


def asked_again(assistant: Assistant, stage: ReinforceStage, what: str) -> tuple[float, int]:
    """The share of right answers to questions of the sort that `stage` asked, about scenes that nobody trains on."""
    from training.reinforce import SceneQuestions

    questions = SceneQuestions(stage, output_side(assistant.processor.image_processor), EVALUATION_SEED)
    asked = [questions.question(place) for place in range(ASKED)]
    requests = [Request(question.question, (scene.image,)) for scene, question in asked]
    given = answer_all(assistant, requests, f"{what}: what was reinforced", ANSWER_TOKENS, BATCH)
    return share_right(given, [question.answer for _, question in asked]), ASKED


def compared(before: Measured, after: Measured) -> tuple[Change, ...]:
    """A line for each measure, with 95 % intervals."""
    changes = []
    for field, words in LINES.items():
        pair = [getattr(one, field) for one in (before, after)]
        if None not in pair:
            shares = [Share(share, *wilson_interval(share, count)) if count else None for share, count in pair]
            changes.append(Change(words, max(count for _, count in pair), *shares))
    return tuple(changes)


def table_of(changes: Sequence[Change]) -> Table:
    """The lines as a table for the terminal."""
    table = Table(*COLUMNS, title="Before and after, on scenes that nobody trained on")
    for change in changes:
        table.add_row(*change.cells())
    return table
