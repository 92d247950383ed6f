"""What a recipe may say: every field typed and documented, unknown keys fatal."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from assistant.projectors import Projector
from assistant.tiles import Grid
from training.adapters import LoraSettings
from training.objectives.instruct import Part
from training.preference_stages import PreferenceStage, ReinforceStage, RewardStage
from training.recipe_parts import ConversationSource, PictureSource, Schedule, TextSource
from training.strict import Strict, faults_in

__all__ = ["ConversationSource", "PictureSource", "Schedule", "TextSource"]

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file and the field."""


class TrainingError(RecipeError):
    """A run that cannot go on; the message says at which step, why, and the way out."""


class MixturePhase(Strict):
    """Other weights from some point of the run on, a number for each source in its order."""

    start: float = Field(ge=0, lt=1, description="share of the run after which they hold")
    mixture: tuple[Annotated[float, Field(ge=0)], ...] = ()
    texts: tuple[Annotated[float, Field(ge=0)], ...] = ()
    conversations: tuple[Annotated[float, Field(ge=0)], ...] = ()


class TokenizerStage(Strict):
    """Train the tokenizer."""

    kind: Literal["tokenizer"]
    name: str
    vocabulary: int = Field(ge=300, le=128_000, description="words, of which 256 are bytes and 7 are special")
    documents: int = Field(50_000, ge=1, description="how many texts it learns from")
    longest: int = Field(1024, ge=64, description="tokens that the model may see at once")
    texts: tuple[TextSource, ...]
    exclude_captions_of: tuple[str, ...] = Field((), description="shards whose captions may not be among the texts")


class TransformerShape(Strict):
    """A new vision transformer in the layout of CLIP, SigLIP, DINOv2 or the plain ViT."""

    family: Literal["clip", "siglip", "dinov2", "vit"]
    width: int = Field(256, ge=32)
    layers: int = Field(8, ge=2)
    heads: int = Field(4, ge=1)
    patch: int = Field(16, ge=4, description="pixels of a patch's side")
    image_side: int = Field(160, ge=32, description="pixels of the finished tower's pictures")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth; dinov2 only")
    layer_scale: float = Field(1.0, gt=0, description="where LayerScale starts; dinov2 only")


class ResidualShape(Strict):
    """A new ResNet."""

    family: Literal["resnet"]
    depth: Literal[18, 50] = 50
    image_side: int = Field(160, ge=32, description="pixels of the finished tower's pictures")


class TextShape(Strict):
    """The text half of a new CLIP or SigLIP."""

    layers: int = Field(3, ge=1)
    length: int = Field(24, ge=8, description="most tokens of a text")


class MonitorSource(PictureSource):
    """Pictures that a monitor looks at: one source alone, so that no weight has to be said."""

    weight: float = Field(1.0, gt=0, description="not used")

    @model_validator(mode="after")
    def _can_be_looked_at_again(self) -> "MonitorSource":
        if self.stream:
            raise ValueError("a monitor looks at the same pictures again and again, and a stream is read once")
        return self


class Monitor(Strict):
    """What is looked at while a tower trains. Looking changes nothing of what trains."""

    every: int = Field(200, ge=1, description="steps from look to look; there is one before the first and at the end")
    pictures: int = Field(256, ge=8, description="most held-out pictures of each kind that are looked at")
    labelled: MonitorSource | None = Field(
        None, description="labelled pictures for kNN and zero-shot; the held-out ones where they have labels"
    )
    pairs: MonitorSource | None = Field(
        None, description="pictures with texts for retrieval; the held-out ones where they have texts"
    )


class TowerStage(Strict):
    """Pretrain a vision tower with one of our objectives."""

    kind: Literal["tower"]
    name: str
    objective: str = Field(description="a file of training/objectives, such as siglip or dino")
    settings: dict[str, Any] = Field({}, description="what that file's Settings say; its defaults where unset")
    backbone: Annotated[TransformerShape | ResidualShape, Field(discriminator="family")] | None = Field(
        None, description="a new tower; unset when start_from is set"
    )
    text: TextShape | None = Field(None, description="its text half, for an objective that compares with texts")
    tokenizer: str | None = Field(
        None, description="the stage, or a folder, whose tokenizer a new text half (or `regions`) reads with"
    )
    start_from: str | None = Field(None, description="a stage, folder or hub name whose weights go on")
    side: int = Field(ge=32, description="pixels of a view; smaller than image_side trains faster at first")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer learns at this share of the layer above it")
    attention: Literal["sdpa", "eager"] | None = Field(
        None, description="eager trains small towers faster on a CPU; transformers' choice where unset"
    )
    mixture: tuple[PictureSource, ...]
    held_out: tuple[PictureSource, ...] = Field(
        (), description="pictures that validate; where unset, one in 32 of the mixture's is kept aside for it"
    )
    held_out_samples: int = Field(512, ge=2)
    monitor: Monitor | None = Field(Monitor(), description="what is looked at on the way; null looks at nothing")
    schedule: Schedule

    @model_validator(mode="after")
    def _one_start(self) -> "TowerStage":
        if (self.backbone is None) == (self.start_from is None):
            raise ValueError("name either a backbone, which is new, or start_from")
        if self.text is not None and self.backbone is None:
            raise ValueError("a text half is new with its backbone; leave it out where start_from is set")
        if any(source.stream for source in (*self.mixture, *self.held_out)):
            if len(self.mixture) > 1 or any(source.stream for source in self.held_out):
                raise ValueError("a stream cannot be mixed or held out: let it be the only source of the mixture")
            if not self.held_out:
                raise ValueError("nothing can be kept aside of a stream: name the pictures that validate in held_out")
        check_settings(self.objective, self.settings)
        return self


def objective_module(name: str) -> ModuleType:
    """The module of `training.objectives` called `name`. Raises ValueError naming those there are."""
    folder = Path(__file__).parent / "objectives"
    if not name.isidentifier() or not (folder / f"{name}.py").is_file():
        there = sorted(file.stem for file in folder.glob("*.py") if "\ndef build(" in file.read_text())
        raise ValueError(f"there is no objective {name!r}; there are {', '.join(there)}")
    return import_module(f"training.objectives.{name}")


def check_settings(objective: str, settings: dict[str, Any]) -> Any:
    """`settings` as the Settings of `objective`. Raises ValueError naming the key that does not fit."""
    module = objective_module(objective)
    if not hasattr(module, "build"):
        raise ValueError(f"{objective} trains no tower by itself")
    try:
        return module.Settings.model_validate(settings)
    except ValidationError as error:
        raise ValueError(f"{objective}: {faults_in(error, 'settings', 'settings')}") from error


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
    tower: str | None = Field(
        None,
        description="stage, folder or hub name of the tower to join; beside start_from, instead of its own",
    )
    language_model: str | None = Field(None, description="stage, folder or hub name of the language model to join")
    projector: Projector = Field("mlp", description="what stands between the two that are joined")
    start_from: str | None = Field(None, description="stage, folder or hub name of a LLaVA that goes on")
    tiles: tuple[Grid, ...] = Field(
        (), description="rows and columns of the grids that large pictures are cut by (LLaVA-NeXT); a model's own stay"
    )
    trains: tuple[Part, ...] = Field(min_length=1, description="tower, projector, language")
    lora: LoraSettings | None = Field(None, description="train an adapter in place of the language model's own weights")
    four_bits: bool = Field(False, description="QLoRA: hold the language model in NF4 while its adapter trains")
    rates: dict[Part, float] = Field({}, description="share of the learning rate for a part; 1 where unset")
    turns: int = Field(5, ge=1, description="most turns of one lesson")
    longest: int = Field(400, ge=128, description="most tokens of one lesson")
    attention: Literal["sdpa", "eager"] | None = Field(
        None, description="eager trains short lessons faster on a CPU; transformers' choice where unset"
    )
    packing: bool | None = Field(
        None, description="lessons in one row without padding, each within itself; on where attention is unset"
    )
    still: Literal["float32", "bfloat16"] = Field(
        "float32", description="how weights that do not train are held; bfloat16 counts in mixed precision only"
    )
    feature_memory: float | None = Field(
        None, ge=0, description="GiB of a still tower's features; 2 where unset and every picture comes as it is"
    )
    length_power: float = Field(0.0, ge=0, le=1, description="tokens of an n-token answer weigh n to the minus this")
    mixture: tuple[PictureSource, ...] = Field((), description="lessons from shards of pictures and from scenes")
    texts: tuple[TextSource, ...] = Field((), description="lessons without a picture: rows with a prompt")
    conversations: tuple[ConversationSource, ...] = Field((), description="lessons from data that people have")
    phases: tuple[MixturePhase, ...] = Field((), description="weights that change on the way; shares are exact then")
    replay: tuple[PictureSource, ...] = Field((), description="what the model knew and shall not forget")
    replay_share: float = Field(0.1, gt=0, lt=1, description="of the samples, at every time, where there is replay")
    held_out: tuple[PictureSource, ...] = Field((), description="lessons that validate, from shards and scenes")
    held_out_conversations: tuple[ConversationSource, ...] = Field(
        (), description="conversations that validate; where nothing is held out, one in 32 conversations is kept aside"
    )
    held_out_samples: int = Field(256, ge=1)
    schedule: Schedule

    @model_validator(mode="after")
    def _one_start(self) -> "InstructStage":
        joins = self.tower is not None and self.language_model is not None
        if joins == (self.start_from is not None) or (self.language_model is not None and not joins):
            raise ValueError("name either start_from, perhaps with another tower for it, or tower and language_model")
        if self.lora is not None and (self.start_from is None or "language" not in self.trains):
            raise ValueError("lora stands on the language model of a LLaVA: say start_from, and train `language`")
        if self.lora is not None and (self.tiles or self.tower):
            raise ValueError(
                "tiles or another tower make a new base, and lora stands on a finished one: do that a stage earlier"
            )
        if self.four_bits and self.lora is None:
            raise ValueError("four_bits: weights of 4 bits cannot train themselves; say what trains instead in lora")
        if self.packing and self.attention is not None:
            raise ValueError("packing brings its own attention; leave attention unset")
        for source in (*self.mixture, *self.held_out, *self.replay):
            if (source.shard is None and source.scenes is None) or source.use in ("pictures", "statements"):
                raise ValueError("lessons come from a shard or from scenes, with their captions, labels or questions")
        return self

    def weights(self) -> list[float]:
        """Of its pictures, texts and conversations, in this order."""
        pictures, texts = [s.weight for s in self.mixture], [s.weight for s in self.texts]
        return [*pictures, *texts, *(s.weight for s in self.conversations)]

    @model_validator(mode="after")
    def _sources_and_phases(self) -> "InstructStage":
        if not (self.mixture or self.texts or self.conversations):
            raise ValueError("name what is taught: mixture, texts or conversations")
        if not (self.held_out or self.held_out_conversations or self.conversations):
            raise ValueError("name the lessons that validate: held_out or held_out_conversations")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases start one after the other, not at {starts}")
        for phase in self.phases:
            for field in ("mixture", "texts", "conversations"):
                said, sources = len(getattr(phase, field)), len(getattr(self, field))
                if said != sources:
                    raise ValueError(f"the phase from {phase.start:g} has {said} weights for {sources} {field}")
            if not sum((*phase.mixture, *phase.texts, *phase.conversations)):
                raise ValueError(f"in the phase from {phase.start:g} every weight is 0")
        if not sum(self.weights()) and starts[:1] != [0]:
            raise ValueError("every weight is 0 where the run starts")
        return self


Stage = Annotated[
    TokenizerStage | TowerStage | LanguageStage | InstructStage | PreferenceStage | RewardStage | ReinforceStage,
    Field(discriminator="kind"),
]


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
        short = {"steps": steps, "batch_size": 4, "warmup_steps": 1, "log_every": 1, "save_every": 1, "compile": False}
        fewer: dict[str, Any] = {"held_out_samples": 4}
        if isinstance(stage, LanguageStage):
            fewer = {"held_out_blocks": 2}
        elif isinstance(stage, TowerStage) and stage.monitor is not None:
            fewer["monitor"] = stage.monitor.model_copy(update={"pictures": 8})
        return stage.model_copy(update={"schedule": stage.schedule.model_copy(update=short)} | fewer)

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
        raise RecipeError(f"{file}: {faults_in(error, 'the recipe')}") from error
