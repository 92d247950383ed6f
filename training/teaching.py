"""Align and tune by short commands: a recipe of one instruct stage, with defaults that fit the model and the data."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from assistant.models import find_model, read_json
from training.adapters import LoraSettings
from training.config import (
    ConversationSource,
    InstructStage,
    PictureSource,
    Recipe,
    RecipeError,
    Schedule,
    rehearsal,
)
from training.data.recognise import recognise
from training.objectives.instruct import Part
from training.ranks import dividing, passing_folder, share_of
from training.recipe import run_recipe
from training.stages import Workshop, prepared_lessons
from training.teaching_card import kept_card
from training.teaching_plan import TeachingPlan, measured_plan

Mode = Literal["align", "full", "lora", "qlora"]
Stored = Literal["float32", "bfloat16"]  # of what comes out: a model that is stored in float32 would leave rounded
TRAINS: dict[Mode, tuple[Part, ...]] = {
    "align": ("projector",),
    "full": ("projector", "language"),
    "lora": ("language",),
    "qlora": ("language",),
}
# LLaVA-1.5's rates (Liu et al. 2023, table 9, and its LoRA script), for a language model that is 4096 wide.
RATES: dict[Mode, float] = {"align": 1e-3, "full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
PUBLISHED_WIDTH = 4096
HIGHEST_RATE = 1e-3
LONGEST = 2048  # tokens, as LLaVA-1.5
BATCH = 8
EPOCHS = 3.0
WARMUP = 0.03  # of the steps
REPLAYED_SCENES = 1_000_000


@dataclass(frozen=True)
class Wish:
    """What a person asks for; what is None is chosen."""

    model: str | None  # Joey where None
    data: str
    mode: Mode
    out: Path
    pictures: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    replay: float = 0.0
    downloads: bool = False
    seed: int = 1
    held_out: str | None = None
    rate_times: float = 1.0  # of the learning rate, chosen or said
    paths: bool = True  # else pictures are data URLs in the rows alone


def teaching_recipe(wish: Wish) -> Recipe:
    """The recipe of one stage that does what `wish` asks.

    Raises ModelError where the model, DataError where the data, and RecipeError where the wish is at fault.
    """
    text, stored = settings_of(wish.model)
    source = conversation_source(wish.data, wish.pictures, wish.downloads, paths=wish.paths)
    held_out: tuple[ConversationSource, ...] = ()
    if wish.held_out is not None:
        held_out = (conversation_source(wish.held_out, wish.pictures, wish.downloads, paths=wish.paths),)
    rows = len(recognise(source.conversations if source.hub else Path(source.conversations), source.split))
    batch = wish.batch_size or dividing(min(BATCH, rows))
    steps = _steps(wish, rows, batch)
    schedule = Schedule(
        steps=steps,
        batch_size=share_of(batch),
        learning_rate=wish.rate_times * (wish.learning_rate or default_rate(wish.mode, int(text["hidden_size"]))),
        final_rate=0.0,
        warmup_steps=math.ceil(WARMUP * steps),
        weight_decay=0.0,
        beta2=0.999,
        log_every=max(1, steps // 20),
        evaluate_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        seed=wish.seed,
    )
    stage = InstructStage(
        kind="instruct",
        name=wish.mode,
        start_from=start_of(wish.model),
        trains=TRAINS[wish.mode],
        lora=LoraSettings(rank=wish.rank or 16, alpha=2 * (wish.rank or 16))
        if wish.mode in ("lora", "qlora")
        else None,
        four_bits=wish.mode == "qlora",
        still=stored,
        longest=min(LONGEST, int(text["max_position_embeddings"])),
        conversations=(source,),
        held_out_conversations=held_out,
        replay=(PictureSource(scenes=REPLAYED_SCENES, weight=1.0),) if wish.replay else (),
        replay_share=wish.replay or 0.1,
        held_out_samples=min(64, rows),
        schedule=schedule,
    )
    return Recipe(
        name=wish.out.name,
        about=f"{wish.mode} of {wish.model or 'Joey'} on {Path(wish.data).name}.",
        stages=(stage,),
        publish=stage.name,
        dtype=stored,
    )


def plan_of(recipe: Recipe, runs: Path) -> TeachingPlan:
    """What the one stage of `recipe` is about to do, measured on its own first lessons.

    Raises RecipeError or DataError where model or data are at fault.
    """
    stage = recipe.stages[0]
    if not isinstance(stage, InstructStage):
        raise RecipeError(f"{recipe.name}: a {stage.kind} stage teaches no assistant")
    objective, lessons, _ = prepared_lessons(stage, Workshop(runs / recipe.name, None))
    return measured_plan(objective, stage, lessons)


def rehearse(recipe: Recipe, runs: Path) -> None:
    """Two tiny steps of `recipe` from loading to the exported model, in a folder that is gone afterwards.

    Raises whatever the run itself would, minutes or hours earlier.
    """
    with passing_folder("kangaroo-rehearsal-", runs) as folder:
        run_recipe(rehearsal(recipe), None, folder)


def teach(recipe: Recipe, runs: Path) -> Path:
    """Run `recipe`, or go on with it where it stopped, and return the folder of the finished model.

    The README.md that a person wrote there stays.
    """
    with kept_card(runs / recipe.name / "model"):
        return run_recipe(recipe, None, runs)


def default_rate(mode: Mode, width: int) -> float:
    """LLaVA-1.5's learning rate, carried over to a language model of `width`.

    The best rate of Adam falls with one over the width (Yang et al. 2022, Tensor Programs V), so a narrower model gets
    a higher one, up to a rate at which small models of ours still trained well. A projector has LLaVA's own.
    """
    if mode == "align":
        return RATES[mode]
    return min(HIGHEST_RATE, RATES[mode] * max(1.0, PUBLISHED_WIDTH / width))


def _steps(wish: Wish, rows: int, batch: int) -> int:
    if wish.steps is not None and wish.epochs is not None:
        raise RecipeError("say --steps or --epochs, not both")
    if wish.steps is not None:
        return wish.steps
    return max(1, math.ceil((wish.epochs or EPOCHS) * rows / batch))


def start_of(model: str | None) -> str:
    """The name or absolute path of the model, so that a run goes on from wherever it is called."""
    folder = find_model(model)
    return str(folder.absolute()) if model is None or Path(model).expanduser().is_dir() else model


def settings_of(model: str | None) -> tuple[dict[str, Any], Stored]:
    """What the config of `model` says of its language model, and how its weights are stored.

    Raises ModelError where it is not there.
    """
    config = read_json(find_model(model) / "config.json")
    bfloat16 = config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    return config.get("text_config", config), "bfloat16" if bfloat16 else "float32"


def conversation_source(data: str, pictures: str | None, downloads: bool, **more: Any) -> ConversationSource:
    """The rows of `data`, a file or a data set of the hub, with `more` that the source may say."""
    path = Path(data).expanduser()
    return ConversationSource(
        conversations=str(path.absolute()) if path.exists() else data,
        hub=not path.exists() and len(data.split("/")) == 2 and not data.startswith((".", os.sep)),
        pictures=None if pictures is None else str(Path(pictures).expanduser().absolute()),
        downloads=downloads,
        **more,
    )
