"""Prefer, judge and reinforce by short commands: a recipe of one stage, with defaults that fit model and data."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from training.adapters import LoraSettings
from training.config import PictureSource, Recipe, RecipeError, Schedule
from training.data.preference_rows import open_preferences
from training.preference_stages import HELD_OUT, PreferenceStage, ReinforceStage, RewardStage
from training.teaching import (
    EPOCHS,
    LONGEST,
    WARMUP,
    conversation_source,
    default_rate,
    settings_of,
    start_of,
)

Kind = Literal["preference", "reward", "reinforce"]
# Of the rate that an adapter is tuned at: what a model prefers moves faster than what it knows, and too fast breaks it.
SHARE_OF_RATE: dict[Kind, float] = {"preference": 0.25, "reward": 1.0, "reinforce": 0.25}
STEPS: dict[Kind, int] = {"preference": 300, "reward": 300, "reinforce": 200}  # on scenes, which never end
BATCH = 8
SCENES = 1_000_000


@dataclass(frozen=True)
class AfterWish:
    """What a person asks for; what is None is chosen."""

    kind: Kind
    model: str | None  # Joey where None
    out: Path
    data: str | None = None  # pairs; generated scenes where neither data nor captions are named
    captions: Path | None = None
    pictures: str | None = None
    downloads: bool = False
    scene_kinds: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    judge: str | None = None
    answers: int = 8
    temperature: float = 1.0
    beta: float | None = None
    imitation: float = 0.0
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    seed: int = 1


def after_tuning_recipe(wish: AfterWish) -> Recipe:
    """The recipe of one stage that does what `wish` asks.

    Raises ModelError where the model, DataError where the data, and RecipeError where the wish is at fault.
    """
    if wish.data is not None and wish.captions is not None:
        raise RecipeError("say --data or --captions, not both")
    text, stored = settings_of(wish.model)
    rows = _rows(wish)
    rank = wish.rank or 16
    said: dict[str, Any] = {
        "kind": wish.kind,
        "name": wish.kind,
        "start_from": start_of(wish.model),
        "lora": LoraSettings(rank=rank, alpha=2 * rank),
        "still": stored,
        "schedule": _schedule(wish, rows, int(text["hidden_size"])),
    }
    if wish.beta is not None:
        said["beta"] = wish.beta
    stage = _stage(wish, said, rows, min(LONGEST, int(text["max_position_embeddings"])))
    return Recipe(
        name=wish.out.name,
        about=f"{wish.kind} of {wish.model or 'Joey'} on {_data_in_words(wish)}.",
        stages=(stage,),
        publish=stage.name,
        dtype=stored,
    )


def _rows(wish: AfterWish) -> int | None:
    """How many pairs the person's file has; None where none is named."""
    if wish.data is None:
        return None
    path = Path(wish.data).expanduser()
    return len(open_preferences(path if path.exists() else wish.data))


def _stage(
    wish: AfterWish, said: dict[str, Any], rows: int | None, longest: int
) -> PreferenceStage | RewardStage | ReinforceStage:
    if wish.kind == "reinforce":
        judge = None if wish.judge is None else start_of(wish.judge)
        asked = {"scene_kinds": wish.scene_kinds, "questions": wish.questions, "judge": judge}
        tried = {"answers": wish.answers, "temperature": wish.temperature}
        return ReinforceStage.model_validate(said | asked | tried)
    # Of a file not more than it has rows, or the few of a small one would be asked again and again.
    said |= {"longest": longest, "held_out_samples": min(HELD_OUT, rows or HELD_OUT)} | _sources(wish)
    if wish.kind == "reward":
        return RewardStage.model_validate(said)
    return PreferenceStage.model_validate(said | {"imitation": wish.imitation})


def _sources(wish: AfterWish) -> dict[str, Any]:
    if wish.captions is not None:
        return {"mixture": (PictureSource(captions=str(wish.captions.expanduser().absolute()), weight=1.0),)}
    if wish.data is None:
        return {"mixture": (PictureSource(scenes=SCENES, weight=1.0),)}
    # A person is told of every bad row.
    return {"pairs": (conversation_source(wish.data, wish.pictures, wish.downloads, damaged=0.0),)}


def _schedule(wish: AfterWish, rows: int | None, width: int) -> Schedule:
    batch, steps = wish.batch_size or BATCH, wish.steps or STEPS[wish.kind]
    if rows is not None:
        batch = wish.batch_size or min(BATCH, rows)
        steps = wish.steps or max(1, math.ceil(EPOCHS * rows / batch))
    return Schedule(
        steps=steps,
        batch_size=batch,
        learning_rate=wish.learning_rate or SHARE_OF_RATE[wish.kind] * default_rate("lora", width),
        final_rate=0.1,
        warmup_steps=math.ceil(WARMUP * steps),
        weight_decay=0.0,
        beta2=0.999,
        log_every=max(1, steps // 40),
        evaluate_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        seed=wish.seed,
    )


def _data_in_words(wish: AfterWish) -> str:
    if wish.data is not None:
        return Path(wish.data).name
    return "generated scenes" if wish.captions is None else wish.captions.name
