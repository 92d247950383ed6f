"""Stages behind instruction tuning: from pairs of answers, as a judge of answers, and by trying answers out."""

from typing import Literal

from pydantic import Field, model_validator

from training.adapters import LoraSettings
from training.data.scene_facts import SceneKind
from training.data.scene_wording import QuestionKind
from training.recipe_parts import ConversationSource, PictureSource, Schedule
from training.strict import Strict

# What a schedule may say that only our own trainer does.
OURS_ALONE = ("final_weight_decay", "compile")
HELD_OUT = 256  # pairs that validate where a recipe does not say


class _AdapterStage(Strict):
    """What these stages have in common: an adapter trains on the language model of a LLaVA."""

    name: str
    start_from: str | None = Field(None, description="stage, folder or hub name of a LLaVA; Joey where unset")
    lora: LoraSettings = Field(LoraSettings(), description="the adapter that trains")
    still: Literal["float32", "bfloat16"] = Field(
        "float32", description="how weights that do not train are held; bfloat16 counts in mixed precision only"
    )
    schedule: Schedule

    @model_validator(mode="after")
    def _trl_can(self) -> "_AdapterStage":
        said = [name for name in OURS_ALONE if getattr(self.schedule, name)]
        if said:
            raise ValueError(f"schedule.{said[0]} is not done in a {type(self).__name__}; leave it out")
        return self


class PairStage(_AdapterStage):
    """A stage that learns from pairs: two answers to one question, of which one is better."""

    mixture: tuple[PictureSource, ...] = Field(
        (), description="scenes, or pictures with captions, from which pairs are made: what is not seen is worse"
    )
    pairs: tuple[ConversationSource, ...] = Field(
        (), description="rows of image, question, chosen and rejected, or preferences as OpenAI writes them"
    )
    held_out: tuple[PictureSource, ...] = Field((), description="scenes and captioned pictures that validate")
    held_out_pairs: tuple[ConversationSource, ...] = Field(
        (), description="pairs that validate; where nothing is held out, some of each source are kept aside"
    )
    held_out_samples: int = Field(HELD_OUT, ge=1)
    longest: int = Field(400, ge=128, description="most tokens of a question with one answer")

    @model_validator(mode="after")
    def _sources(self) -> "PairStage":
        if not (self.mixture or self.pairs):
            raise ValueError("name where pairs come from: mixture or pairs")
        for source in (*self.mixture, *self.held_out):
            if source.stream or source.use != "captions":
                raise ValueError("pairs are made from scenes and captions; leave `use` out, and do not stream")
        if not any([*(source.weight for source in self.mixture), *(source.weight for source in self.pairs)]):
            raise ValueError("every weight is 0")
        return self


class PreferenceStage(PairStage):
    """Teach a LLaVA to prefer the better answer of each pair (DPO, Rafailov et al. 2023)."""

    kind: Literal["preference"]
    beta: float = Field(0.1, gt=0, description="how dear it is to leave what the model was; smaller goes further")
    imitation: float = Field(
        0.0, ge=0, description="weight of plainly learning the better answer beside, lest both become unlikely"
    )


class RewardStage(PairStage):
    """Teach a copy of a LLaVA to judge answers: one number, higher for the better one of each pair."""

    kind: Literal["reward"]


class ReinforceStage(_AdapterStage):
    """Let a LLaVA try several answers to each question, and make the right ones likelier (GRPO, Shao et al. 2024)."""

    kind: Literal["reinforce"]
    scenes: int = Field(1_000_000, ge=1, description="how many different generated scenes")
    scene_kinds: tuple[SceneKind, ...] = Field((), description="scenes of these kinds only, all as often")
    questions: tuple[QuestionKind, ...] = Field((), description="questions of these kinds only")
    judge: str | None = Field(
        None, description="stage or folder of a reward model whose numbers are the reward; exact answers where unset"
    )
    answers: int = Field(8, ge=2, description="that are tried for each question; schedule.batch_size counts questions")
    temperature: float = Field(1.0, gt=0, description="higher tries more unlikely answers")
    longest_answer: int = Field(12, ge=1, description="most tokens of an answer")
    beta: float = Field(0.02, ge=0, description="price of leaving what the model was (KL); 0 is free")
    clip: float = Field(0.2, gt=0, lt=1, description="how far one step may move an answer's probability")
    held_out_samples: int = Field(128, ge=1, description="questions that validate, each answered once")
