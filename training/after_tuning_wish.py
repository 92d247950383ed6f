"""Prefer, judge and reinforce by short commands: a recipe of one stage, with defaults that fit model and data."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from assistant.models import find_model, read_json
from training.adapters import LoraSettings
from training.config import ConversationSource, PictureSource, Recipe, RecipeError, Schedule
from training.data.preference_rows import open_preferences
from training.preference_stages import PreferenceStage, ReinforceStage, RewardStage
from training.teaching import EPOCHS, LONGEST, WARMUP, default_rate

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
    config = read_json(find_model(wish.model) / "config.json")
    text = config.get("text_config", config)
    bfloat16 = config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    stored: Literal["float32", "bfloat16"] = "bfloat16" if bfloat16 else "float32"
    rank = wish.rank or 16
    said: dict[str, Any] = {
        "kind": wish.kind,
        "name": wish.kind,
        "start_from": _start(wish.model),
        "lora": LoraSettings(rank=rank, alpha=2 * rank),
        "still": stored,
        "schedule": _schedule(wish, int(text["hidden_size"])),
    }
    if wish.beta is not None:
        said["beta"] = wish.beta
    stage = _stage(wish, said, min(LONGEST, int(text["max_position_embeddings"])))
    return Recipe(
        name=wish.out.name,
        about=f"{wish.kind} of {wish.model or 'Joey'} on {_data_in_words(wish)}.",
        stages=(stage,),
        publish=stage.name,
        dtype=stored,
    )


def _stage(wish: AfterWish, said: dict[str, Any], longest: int) -> PreferenceStage | RewardStage | ReinforceStage:
    if wish.kind == "reinforce":
        asked = {"scene_kinds": wish.scene_kinds, "questions": wish.questions}
        tried = {"answers": wish.answers, "temperature": wish.temperature}
        return ReinforceStage.model_validate(said | asked | tried)
    said |= {"longest": longest} | _sources(wish)
    if wish.kind == "reward":
        return RewardStage.model_validate(said)
    return PreferenceStage.model_validate(said | {"imitation": wish.imitation})


def _sources(wish: AfterWish) -> dict[str, Any]:
    if wish.captions is not None:
        return {"mixture": (PictureSource(captions=str(wish.captions.expanduser().absolute()), weight=1.0),)}
    if wish.data is None:
        return {"mixture": (PictureSource(scenes=SCENES, weight=1.0),)}
    path = Path(wish.data).expanduser()
    pairs = ConversationSource(
        conversations=str(path.absolute()) if path.exists() else wish.data,
        hub=not path.exists() and len(wish.data.split("/")) == 2 and not wish.data.startswith((".", "/")),
        pictures=None if wish.pictures is None else str(Path(wish.pictures).expanduser().absolute()),
        downloads=wish.downloads,
        damaged=0.0,  # a person is told of every bad row
    )
    return {"pairs": (pairs,)}


def _schedule(wish: AfterWish, width: int) -> Schedule:
    batch, steps = wish.batch_size or BATCH, wish.steps or STEPS[wish.kind]
    if wish.data is not None:
        path = Path(wish.data).expanduser()
        rows = len(open_preferences(path if path.exists() else wish.data))
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


def _start(model: str | None) -> str | None:
    """The name or absolute path of the model, so that a run goes on from wherever it is called."""
    if model is None or not Path(model).expanduser().is_dir():
        return model
    return str(Path(model).expanduser().absolute())


def _data_in_words(wish: AfterWish) -> str:
    if wish.data is not None:
        return Path(wish.data).name
    return "generated scenes" if wish.captions is None else wish.captions.name
