"""Build what a stage would train on torch's meta device: every parameter with its name and shape, and no memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from assistant.chat import BEGIN_TOKEN, END_TOKEN, JOEY_TEMPLATE, PAD_TOKEN, SPECIAL_TOKENS, UNKNOWN_TOKEN
from assistant.fusion import join
from assistant.towers import Tower, load_tower
from training.adapters import add_lora
from training.config import (
    InstructStage,
    LanguageStage,
    RecipeError,
    Stage,
    TokenizerStage,
    TowerStage,
)
from training.instruct_start import build_instruct_objective
from training.objective import Objective, Start
from training.objectives.instruct import InstructObjective
from training.objectives.language import LanguageObjective
from training.stages import Workshop, build_tower_objective, new_language_model
from training.tower_start import new_start, objective_on


@dataclass(frozen=True)
class Subjects:
    """Builds objectives of stages; what a stage takes from an earlier one, it takes from that one's settings.

    `stages` are all of the recipe. What is neither among them nor finished in `workshop` is a folder or a hub name, and
    is really loaded.
    """

    workshop: Workshop
    stages: Sequence[Stage] = ()

    def objective(self, stage: Stage) -> Objective:
        """The objective of `stage`. Raises RecipeError where it trains no model, or its parts do not fit."""
        match stage:
            case TowerStage():
                return self._tower_objective(stage)
            case LanguageStage():
                model, tokenizer = self._language_model(stage)
                return LanguageObjective(model, tokenizer)
            case InstructStage():
                return self._instruct_objective(stage)
            case TokenizerStage():
                raise RecipeError(f"stage {stage.name} trains a tokenizer: that costs minutes of one processor")
            case _:
                raise RecipeError(
                    f"stage {stage.name} trains an adapter on what is tuned already: it cannot be planned"
                )

    def _named(self, name: str | None) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def _tower_objective(self, stage: TowerStage) -> Objective:
        earlier = self._first_of(stage)
        if earlier is None:
            return build_tower_objective(stage, self.workshop)
        start = self._new_start(earlier, stage.side)
        with torch.device("meta"):
            return objective_on(stage, start)

    def _first_of(self, stage: TowerStage) -> TowerStage | None:
        """The stage whose new tower `stage` trains; None where that comes from a folder."""
        while stage.backbone is None:
            earlier = self._named(stage.start_from)
            if not isinstance(earlier, TowerStage):
                return None
            stage = earlier
        return stage

    def _new_start(self, stage: TowerStage, side: int) -> Start:
        """What `stage` begins with, in views of `side` pixels."""
        with torch.device("meta"):
            start = new_start(stage, side, self._tokenizer)
        # An objective reads and sets these two when it is built, so they have to have a value.
        if start.model is not None:
            for name in {"logit_scale", "logit_bias"} & dict(start.model.named_parameters()).keys():
                setattr(start.model, name, nn.Parameter(torch.ones(getattr(start.model, name).shape)))
        return start

    def _tokenizer(self, name: str | None) -> PreTrainedTokenizerFast:
        """Joey's where None, a finished stage's, or a stand-in with as many words as the stage `name` will train."""
        stage = self._named(name)
        if isinstance(stage, TokenizerStage) and not (self.workshop.runs / stage.name / "output").is_dir():
            return stand_in_tokenizer(stage.vocabulary)
        return self.workshop.tokenizer(name)

    def _language_model(self, stage: LanguageStage) -> tuple[Any, PreTrainedTokenizerBase]:
        tokenizer = self._tokenizer(stage.tokenizer)
        with torch.device("meta"):
            return new_language_model(stage, tokenizer), tokenizer

    def _instruct_objective(self, stage: InstructStage) -> Objective:
        """A LLaVA of the parts that earlier stages will make; one of a folder or the hub is really loaded."""
        joining = stage
        while joining.start_from is not None:
            earlier = self._named(joining.start_from)
            if not isinstance(earlier, InstructStage):
                return build_instruct_objective(stage, self.workshop.named)
            joining = earlier
        language = self._named(joining.language_model)
        if not isinstance(language, LanguageStage):
            if joining is not stage and not (self.workshop.runs / str(stage.start_from) / "output").is_dir():
                raise RecipeError(
                    f"stage {stage.name} goes on from {stage.start_from}, which joins models that have to be loaded: "
                    f"train {stage.start_from} first (kangaroo train RECIPE --stage {stage.start_from})"
                )
            return build_instruct_objective(stage, self.workshop.named)
        if stage.four_bits:
            raise RecipeError(
                f"stage {stage.name}: what four_bits holds in NF4 is not there yet; train {stage.start_from} first, "
                "and plan a stage with start_from the folder that it leaves"
            )
        model, tokenizer = self._language_model(language)
        seeing = self._seeing(str(joining.tower))
        with torch.device("meta"):
            model, processor = join(seeing.model, model, tokenizer, seeing.image_processor, joining.projector)
            base = str(stage.start_from)
            adapter = None if stage.lora is None else add_lora(model, stage.lora, Path(base), base)
        if stage.attention is not None:
            model.set_attn_implementation(stage.attention)
        return InstructObjective(
            model, processor, stage.trains, stage.longest, stage.length_power, stage.rates, adapter
        )

    def _seeing(self, name: str) -> Any:
        """The tower that the stage `name` leaves, or the one in a folder."""
        stage = self._named(name)
        first = self._first_of(stage) if isinstance(stage, TowerStage) else None
        if first is None:
            return load_tower(self.workshop.output(name))
        start = self._new_start(first, first.side)
        if start.tower is not None:
            return start.tower
        return Tower(start.model.vision_model, start.image_processor)  # type: ignore[union-attr]


def stand_in_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `words` words with our special tokens: what counts before the real one is trained."""
    named = [*SPECIAL_TOKENS, UNKNOWN_TOKEN]
    vocabulary = {token: place for place, token in enumerate(named)}
    vocabulary |= {f"word {place}": place for place in range(len(named), words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
    )
    fast.chat_template = JOEY_TEMPLATE
    return fast
