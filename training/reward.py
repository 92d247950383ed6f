"""Train a judge of answers: a LLaVA with a head of one number, which is higher for the better answer of each pair."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional
from transformers import set_seed

from assistant.projectors import Llava
from assistant.tiles import Processor
from training.adapters import Adapter, export_adapted
from training.data.lesson_judge import LessonJudge
from training.data.samples import Mixture
from training.lessons import Lesson
from training.objectives.instruct import InstructObjective
from training.preference_sets import pair_collator, preference_sets
from training.preference_stages import RewardStage
from training.reward_model import RewardHead
from training.stages import Workshop, samples_of
from training.trainer import train
from training.trl_run import injected, started, token_counts_of


class RewardObjective(InstructObjective):
    """Ranks the answers of pairs (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1).

    trl's RewardTrainer reads texts alone, so that this one runs on our own trainer.
    """

    def __init__(self, model: Llava, processor: Processor, longest: int, adapter: Adapter) -> None:
        """`adapter` stands on `model` already; head and adapter train."""
        super().__init__(model, processor, ("language",), longest, adapter=adapter)
        self.head = RewardHead(int(model.config.text_config.hidden_size))
        self.pairs = pair_collator(processor, longest)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """The loss of B pairs, the share of them that is ranked right, and the mean distance of the two numbers."""
        better, worse = self.head(self.model, batch).chunk(2)
        return {
            "ranking_loss": -functional.logsigmoid(better - worse).mean(),
            "ranked_right": (better > worse).float().mean(),
            "margin": (better - worse).mean(),
        }

    def collate(self, samples: Sequence[Lesson]) -> Mapping[str, Any]:
        """One batch of B pairs, see `pair_collator`."""
        return self.pairs(samples)

    def trained_parameters(self) -> set[str]:
        """The adapter's and the head's."""
        return super().trained_parameters() | {f"head.{name}" for name, _ in self.head.named_parameters()}

    def tokens_of(self, batch: Mapping[str, Any]) -> int:
        """Tokens of words and pictures, without padding."""
        return token_counts_of(batch)[0]

    def export(self, folder: Path) -> None:
        """The LLaVA with its adapter merged, the adapter beside, and the head in a file of its own."""
        if self.adapter is not None:
            export_adapted(self.model, self.adapter, set(), folder)
        self.head.save(folder)


def run_reward(stage: RewardStage, workshop: Workshop) -> dict[str, float]:
    """Train the judge of `stage` and export it; returns the held-out scores, and shares ranked right."""
    objective, train_set, held_out = reward_objective(stage, workshop)
    folder = workshop.runs / stage.name
    before = ranked_right(objective, held_out, stage.schedule.batch_size)
    scores = train(objective, stage.schedule, train_set, held_out, folder)
    state = PartialState()
    if state.is_main_process:
        objective.export(folder / "output")
    state.wait_for_everyone()
    after = ranked_right(objective, held_out, stage.schedule.batch_size)
    return scores | {"ranked_right": after, "ranked_right_before": before}


def reward_objective(
    stage: RewardStage, workshop: Workshop
) -> tuple[RewardObjective, Mixture[Lesson], Mixture[Lesson]]:
    """What trains, what it trains on, and what it is validated on. Raises RecipeError or DataError."""
    set_seed(stage.schedule.seed)
    model, processor, adapter = started(stage, workshop)
    judge = LessonJudge(processor, stage.longest)
    train_set, held_out = preference_sets(stage, judge, workshop.data_folder, samples_of(stage.schedule))
    injected(model, adapter)
    return RewardObjective(model, processor, stage.longest, adapter), train_set, held_out


@torch.no_grad()
def ranked_right(objective: RewardObjective, pairs: Mixture[Lesson], batch_size: int) -> float:
    """The share of `pairs` whose better answer gets the higher number."""
    objective.eval()
    device = objective.head.likelihood.device
    right = 0.0
    for start in range(0, len(pairs), batch_size):
        batch = objective.collate([pairs[place] for place in range(start, min(start + batch_size, len(pairs)))])
        values = objective(**{name: value.to(device) for name, value in batch.items()})
        right += float(values["ranked_right"]) * (len(batch["input_ids"]) // 2)
    return right / len(pairs)
