"""What a stage behind instruction tuning is about to do, measured on its own first steps before it starts."""

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from training.after_tuning import hush_trl
from training.config import Recipe, RecipeError
from training.objectives.instruct import InstructObjective
from training.preference_stages import PreferenceStage, ReinforceStage, RewardStage
from training.recipe_parts import Schedule
from training.stages import Workshop
from training.teaching_plan import TeachingPlan, counting_kept, held_bytes, parts_of
from training.trainer import ObjectiveTrainer
from training.trl_run import TrlRun, token_counts_of

STEPS_MEASURED = 2  # the first warms up, the second is timed


def plan_of(recipe: Recipe, runs: Path) -> TeachingPlan:
    """What the one stage of `recipe` is about to do. Raises RecipeError or DataError where model or data are at fault.

    Two steps are run on a model that is thrown away, with everything that belongs to a step: trying answers, too.
    """
    hush_trl()
    stage, workshop = recipe.stages[0], Workshop(runs / recipe.name, None)
    with tempfile.TemporaryDirectory(prefix="kangaroo-plan-") as folder:
        match stage:
            case PreferenceStage():
                from training.preference import preference_trainer

                trainer, adapter = preference_trainer(stage, workshop, Path(folder) / stage.name)
            case ReinforceStage():
                from training.reinforce import reinforce_trainer

                trainer, adapter = reinforce_trainer(stage, workshop, Path(folder) / stage.name)
            case RewardStage():
                from training.reward import reward_objective

                objective, train_set, held_out = reward_objective(stage, workshop)
                judge = ObjectiveTrainer(objective, stage.schedule, Path(folder) / stage.name, train_set, held_out)
                return measured(judge, objective, stage.schedule)
            case _:
                raise RecipeError(f"{recipe.name}: a {stage.kind} stage has another plan")
        base = trainer.model.get_base_model()
        shown = InstructObjective(base, trainer.processing_class, ("language",), 1, adapter=adapter)
        return measured(trainer, shown, stage.schedule)


def measured(trainer: ObjectiveTrainer | TrlRun, shown: InstructObjective, schedule: Schedule) -> TeachingPlan:
    """Run the first steps of `trainer` forward and back, time the last, and move no weight.

    `shown` tells of the parts of the model that trains.
    """
    batches = iter(trainer.get_train_dataloader())
    trainer.current_gradient_accumulation_steps = schedule.accumulation
    tokens, learned, steps, seconds, kept = 0, 0, 0, 0.0, 0
    for _ in range(min(STEPS_MEASURED, schedule.steps)):
        began = time.monotonic()
        with counting_kept() as storages:
            for batch in islice(batches, schedule.accumulation):
                trainer.training_step(trainer.model, batch, None)
                read, answered = _counted(trainer, batch)
                tokens, learned = tokens + read, learned + answered
        seconds, steps, kept = time.monotonic() - began, steps + 1, max(kept, sum(storages.values()))
    trainer.model.zero_grad(set_to_none=True)
    return TeachingPlan(
        parts=tuple(parts_of(shown)),
        samples=schedule.batch_size * schedule.accumulation,
        tokens=tokens // steps,
        supervised=learned // steps,
        steps=schedule.steps,
        held_bytes=held_bytes(shown),
        kept_bytes=kept // schedule.accumulation,
        seconds=seconds,
    )


def _counted(trainer: ObjectiveTrainer | TrlRun, batch: Any) -> tuple[int, int]:
    return trainer.counted(batch) if isinstance(trainer, TrlRun) else token_counts_of(batch)
