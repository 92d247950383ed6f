"""What a recipe may say: every field typed and documented, unknown keys fatal."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.objectives.instruct import Part

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file and the field."""


class Strict(BaseModel):
    """A part of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Strict):
    """How long and how fast a stage trains."""

    steps: int = Field(ge=1, description="optimiser steps")
    batch_size: int = Field(ge=1, description="samples a step and process, before accumulation")
    accumulation: int = Field(1, ge=1, description="batches a step")
    learning_rate: float = Field(gt=0, description="highest learning rate, reached after the warm-up")
    final_rate: float = Field(0.05, ge=0, le=1, description="share of the learning rate left at the end of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps from zero to the highest learning rate")
    weight_decay: float = Field(0.1, ge=0)
    beta2: float = Field(0.98, gt=0, lt=1, description="AdamW's second moment")
    bf16: bool | None = Field(None, description="mixed precision; where unset, wherever it is fast")
    workers: int = Field(0, ge=0, description="processes that load data beside the training one")
    log_every: int = Field(10, ge=1)
    evaluate_every: int = Field(500, ge=1)
    save_every: int = Field(100, ge=1)
    seed: int = Field(1, ge=0)


class PictureSource(Strict):
    """One source of a mixture: a shard of the data folder, or generated scenes."""

    shard: str | None = Field(None, description="name of the shards, such as flickr8k-train")
    scenes: int | None = Field(None, ge=1, description="how many different generated scenes")
    use: Literal["captions", "labels", "questions"] = Field("captions", description="what of a shard's rows is taught")
    weight: float = Field(gt=0, description="share of the samples, relative to the other sources")

    @model_validator(mode="after")
    def _one_source(self) -> "PictureSource":
        if (self.shard is None) == (self.scenes is None):
            raise ValueError("name either a shard or a number of scenes")
        return self


class TextSource(Strict):
    """One source of text: the rows of a text shard with one `source`, or the words of generated scenes."""

    shard: str | None = Field(None, description="name of the text shards, such as text-train")
    source: str | None = Field(None, description="the rows whose column `source` says so; all where unset")
    scenes: int | None = Field(None, ge=1, description="how many generated scenes lend their captions")
    weight: float = Field(gt=0, description="share of the documents, relative to the other sources")

    @model_validator(mode="after")
    def _one_source(self) -> "TextSource":
        if (self.shard is None) == (self.scenes is None):
            raise ValueError("name either a shard or a number of scenes")
        return self


class TokenizerStage(Strict):
    """Train the tokenizer."""

    kind: Literal["tokenizer"]
    name: str
    vocabulary: int = Field(ge=300, le=128_000, description="words, of which 256 are bytes and 7 are special")
    documents: int = Field(50_000, ge=1, description="how many texts it learns from")
    longest: int = Field(1024, ge=64, description="tokens that the model may see at once")
    texts: tuple[TextSource, ...]
    exclude_captions_of: tuple[str, ...] = Field((), description="shards whose captions may not be among the texts")


class TowerStage(Strict):
    """Pretrain a SigLIP-shaped tower and its text half with the sigmoid loss."""

    kind: Literal["siglip"]
    name: str
    tokenizer: str = Field(description="the stage, or a folder, that made the tokenizer")
    start_from: str | None = Field(None, description="a stage or folder whose SiglipModel goes on; new where unset")
    side: int = Field(ge=64, description="pixels of a view; smaller than image_side trains faster at first")
    image_side: int = Field(160, ge=64, description="pixels of the finished tower's pictures")
    patch: int = Field(16, ge=4)
    width: int = Field(256, ge=32)
    layers: int = Field(8, ge=2)
    heads: int = Field(4, ge=1)
    text_layers: int = Field(3, ge=1)
    text_length: int = Field(24, ge=8)
    smallest_crop: float = Field(0.5, gt=0, le=1, description="smallest share of a picture's area in a view")
    mixture: tuple[PictureSource, ...]
    held_out: tuple[PictureSource, ...]
    held_out_samples: int = Field(512, ge=2)
    schedule: Schedule


class LanguageStage(Strict):
    """Pretrain a Llama-shaped language model."""

    kind: Literal["language"]
    name: str
    tokenizer: str = Field(description="the stage, or a folder, that made the tokenizer")
    width: int = Field(320, ge=32)
    layers: int = Field(6, ge=1)
    heads: int = Field(5, ge=1)
    feed_forward: int = Field(1024, ge=32)
    longest: int = Field(1024, ge=64, description="positions of the finished model")
    block: int = Field(256, ge=16, description="tokens of a training sample")
    texts: tuple[TextSource, ...]
    exclude_captions_of: tuple[str, ...] = Field((), description="shards whose captions may not be among the texts")
    held_out_blocks: int = Field(128, ge=1, description="blocks at the end of the mixture that are never trained on")
    schedule: Schedule


class InstructStage(Strict):
    """Tune a LLaVA on lessons; which parts move is said by `trains`."""

    kind: Literal["instruct"]
    name: str
    tower: str | None = Field(None, description="stage or folder of the tower to join; unset when start_from is set")
    language_model: str | None = Field(None, description="stage or folder of the language model to join")
    start_from: str | None = Field(None, description="stage or folder of a LLaVA that goes on")
    trains: tuple[Part, ...] = Field(min_length=1, description="tower, projector, language")
    rates: dict[Part, float] = Field({}, description="share of the learning rate for a part; 1 where unset")
    turns: int = Field(5, ge=1, description="most turns of one lesson")
    longest: int = Field(400, ge=128, description="most tokens of one lesson")
    length_power: float = Field(0.0, ge=0, le=1, description="tokens of an n-token answer weigh n to the minus this")
    mixture: tuple[PictureSource, ...]
    texts: tuple[TextSource, ...] = Field((), description="lessons without a picture: rows with a prompt")
    held_out: tuple[PictureSource, ...]
    held_out_samples: int = Field(256, ge=1)
    schedule: Schedule

    @model_validator(mode="after")
    def _one_start(self) -> "InstructStage":
        joins = self.tower is not None and self.language_model is not None
        if joins == (self.start_from is not None):
            raise ValueError("name either start_from, or both tower and language_model")
        return self


Stage = Annotated[TokenizerStage | TowerStage | LanguageStage | InstructStage, Field(discriminator="kind")]


class Recipe(Strict):
    """Stages that run one after the other."""

    name: str
    about: str = Field(description="what it trains, in a sentence")
    stages: tuple[Stage, ...] = Field(min_length=1)
    publish: str = Field(description="the stage whose LLaVA is the result")
    embedder: str | None = Field(None, description="the stage whose SiglipModel is kept beside it")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the published weights")

    @model_validator(mode="after")
    def _stages_exist(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages have one name: {names}")
        for used in (self.publish, self.embedder):
            if used is not None and used not in names:
                raise ValueError(f"there is no stage {used!r}; the stages are {', '.join(names)}")
        return self


def rehearsal(recipe: Recipe, steps: int = 2) -> Recipe:
    """The same recipe with `steps` tiny steps a stage: shows in a minute whether data, memory and code agree."""

    def shortened(stage: Stage) -> Stage:
        if isinstance(stage, TokenizerStage):
            return stage.model_copy(update={"documents": 500, "vocabulary": min(stage.vocabulary, 700)})
        short = {"steps": steps, "batch_size": 4, "warmup_steps": 1, "log_every": 1, "save_every": 1}
        held_out = {"held_out_blocks": 2} if isinstance(stage, LanguageStage) else {"held_out_samples": 4}
        return stage.model_copy(update={"schedule": stage.schedule.model_copy(update=short)} | held_out)

    stages = tuple(shortened(stage) for stage in recipe.stages)
    return recipe.model_copy(update={"name": f"{recipe.name}-rehearsal", "stages": stages})


def read_recipe(name: str) -> Recipe:
    """The recipe file `name`, or the shipped recipe of that name. Raises RecipeError naming file and field."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not file.is_file():
        shipped = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
        raise RecipeError(f"there is no recipe {name}; the shipped ones are {shipped}, or name a .yaml file")
    try:
        return Recipe.model_validate(yaml.safe_load(file.read_text()))
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is not YAML: {error}") from error
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"{file}: " + "; ".join(lines)) from error
