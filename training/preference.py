"""Teach a LLaVA which of two answers is better, by direct preference optimisation through trl."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from training.arguments import arguments_of
from training.data.lesson_judge import LessonJudge
from training.data.samples import Mixture
from training.lessons import Lesson
from training.preference_sets import pair_collator, preference_sets
from training.preference_stages import PreferenceStage
from training.stages import Workshop, samples_of
from training.trl_run import TrlRun, run_and_export, started

# trl takes only sets of its own kind, and looks for this column to know that there are pictures: ours holds places.
PLACE = "images"


class PreferenceTrainer(TrlRun, DPOTrainer):
    """trl's DPOTrainer in our house. The reference is the same model with the adapter switched off."""

    names: ClassVar[Mapping[str, str]] = {
        "rewards/margins": "margin",
        "rewards/accuracies": "preferred",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "logps/chosen": "log_probability_chosen",
        "logps/rejected": "log_probability_rejected",
    }
    shown: ClassVar[Sequence[str]] = ("margin", "preferred")


def run_preference(stage: PreferenceStage, workshop: Workshop) -> dict[str, float]:
    """Train the adapter of `stage` and export it, alone and merged; returns the held-out scores."""
    folder = workshop.runs / stage.name
    return run_and_export(*preference_trainer(stage, workshop, folder), folder)


def preference_trainer(stage: PreferenceStage, workshop: Workshop, folder: Path) -> tuple[PreferenceTrainer, Any]:
    """What trains `stage`, and the adapter that it trains. Raises RecipeError or DataError before anything trains."""
    set_seed(stage.schedule.seed)
    model, processor, adapter = started(stage, workshop)
    judge = LessonJudge(processor, stage.longest)
    train_set, held_out = preference_sets(stage, judge, workshop.data_folder, samples_of(stage.schedule))
    collate = pair_collator(processor, stage.longest)
    sets = (train_set, held_out)
    trainer = PreferenceTrainer(
        model=model,
        args=dpo_arguments(stage, folder),
        train_dataset=places_of(train_set, 0),
        eval_dataset=places_of(held_out, 1),
        data_collator=lambda rows: collate([sets[row["held_out"]][row[PLACE]] for row in rows]),
        processing_class=processor,
        peft_config=adapter.config,
    )
    trainer.join_house(stage, folder, stage.schedule.batch_size * stage.schedule.accumulation)
    return trainer, adapter


def places_of(pairs: Mixture[Lesson], held_out: int) -> Dataset:
    """The places of `pairs` as a set that trl takes; the collator finds the pair of each."""
    return Dataset.from_dict({PLACE: list(range(len(pairs))), "held_out": [held_out] * len(pairs)})


def dpo_arguments(stage: PreferenceStage, folder: Path) -> DPOConfig:
    """What `stage` says, in trl's words: the sigmoid loss of Rafailov et al. 2023, eq. 7.

    With `imitation` the negative log-likelihood of the better answer comes on top, as in RPO (Pang et al. 2024, eq. 1,
    there per token of it, here the mean over the batch's tokens, which is trl's).
    """
    losses: Mapping[str, float] = {"sigmoid": 1.0} | ({"sft": stage.imitation} if stage.imitation else {})
    return DPOConfig(
        **arguments_of(stage.schedule, folder / "checkpoints"),
        train_sampling_strategy="sequential",  # the mixture has drawn the order, so that resuming is exact
        gradient_checkpointing=stage.schedule.gradient_checkpointing,
        beta=stage.beta,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        max_length=None,
    )
