"""Let a LLaVA try answers where the right one is known, by group relative policy optimisation through trl."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, cast

from datasets import Dataset
from PIL.Image import Image
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from assistant.chat import user_message
from assistant.models import ModelError
from assistant.tower_shapes import output_side
from training.adapters import Adapter
from training.arguments import arguments_of
from training.config import RecipeError
from training.data.scene_wording import Question
from training.data.scenes import Scene, kind_of, make_scene
from training.evaluation.answers import normalised
from training.lesson_sets import HELD_OUT_SEED
from training.preference_stages import ReinforceStage
from training.reward_model import RewardModel
from training.stages import Workshop, samples_of
from training.trl_run import TrlRun, run_and_export, started

Reward = Callable[..., list[float]]
SCENES_KEPT = 64  # drawn ones: the answers to a question come one after the other and need the same picture
MOST_EMPTY = 200  # scenes in a row without a question of the wanted kinds


class ReinforceTrainer(TrlRun, GRPOTrainer):
    """trl's GRPOTrainer in our house."""

    names: ClassVar[Mapping[str, str]] = {
        "reward": "reward",
        "reward_std": "reward_spread",
        "rewards/exact/mean": "right",
        "frac_reward_zero_std": "groups_alike",
        "kl": "kl",
        "entropy": "entropy",
        "completions/mean_length": "answer_tokens",
        "completions/clipped_ratio": "answers_cut",
    }
    shown: ClassVar[Sequence[str]] = ("reward", "kl")

    def counted(self, batch: Any) -> tuple[int, int]:
        """Tokens of the prompts and of the answers that were tried for the step just done, and of the answers alone."""
        batches = cast(list[Any], self._buffered_inputs)  # trl fills it before the first step
        kept = batches[(self._step - 1) % len(batches)]
        answers = int(kept["completion_mask"].sum())
        return int(kept["prompt_mask"].sum()) + answers, answers


def run_reinforce(stage: ReinforceStage, workshop: Workshop) -> dict[str, float]:
    """Train the adapter of `stage` and export it, alone and merged; returns the held-out scores."""
    folder = workshop.runs / stage.name
    return run_and_export(*reinforce_trainer(stage, workshop, folder), folder)


def reinforce_trainer(stage: ReinforceStage, workshop: Workshop, folder: Path) -> tuple[ReinforceTrainer, Adapter]:
    """What trains `stage`, and the adapter that it trains. Raises RecipeError before anything trains."""
    set_seed(stage.schedule.seed)
    model, processor, adapter = started(stage, workshop)
    rewards = rewards_of(stage, workshop)
    side = output_side(processor.image_processor)
    asked = SceneQuestions(stage, side, 0), SceneQuestions(stage, side, HELD_OUT_SEED)
    questions = samples_of(stage.schedule)
    trainer = ReinforceTrainer(
        model=model,
        reward_funcs=list(rewards),
        args=grpo_arguments(stage, folder, list(rewards.values())),
        train_dataset=asked[0].dataset(questions),
        eval_dataset=asked[1].dataset(stage.held_out_samples),
        processing_class=processor,
        peft_config=adapter.config,
    )
    trainer.join_house(stage, folder, stage.schedule.batch_size * stage.schedule.accumulation * stage.answers)
    return trainer, adapter


def rewards_of(stage: ReinforceStage, workshop: Workshop) -> dict[Reward, float]:
    """What an answer is paid for, each with its weight; exact answers are counted also where a judge pays.

    Raises RecipeError where the judge is none.
    """
    if stage.judge is None:
        return {exact: 1.0}
    try:
        return {judged_by(RewardModel.load(workshop.output(stage.judge))): 1.0, exact: 0.0}
    except ModelError as error:
        raise RecipeError(f"stage {stage.name}: judge: {error}") from error


def judged_by(judge: RewardModel) -> Reward:
    """The numbers that `judge` gives: the answers to one question are read together."""

    def judged(
        completions: Sequence[Any], question: Sequence[str], images: Sequence[list[Image]], **unused: Any
    ) -> list[float]:
        rewards: list[float] = []
        attempts = zip(completions, question, images, strict=True)
        for (asked, _), some in groupby(attempts, lambda attempt: (attempt[1], id(attempt[2][0]))):
            group = list(some)
            rewards += judge.rewards(asked, [said[0]["content"] for said, _, _ in group], group[0][2][0])
        return rewards

    return judged


def exact(completions: Sequence[Any], answer: Sequence[str], **unused: Any) -> list[float]:
    """1 for each answer that equals the right one as `training.evaluation.answers` judges, else 0.

    Args:
        completions: of each attempt its messages, as trl hands them over: one answer.
        answer: the right answer to the question of each attempt.
    """
    said = (attempt[0]["content"] for attempt in completions)
    return [float(normalised(given) == normalised(right)) for given, right in zip(said, answer, strict=True)]


class SceneQuestions:
    """Questions about generated scenes, one about each scene, by place."""

    def __init__(self, stage: ReinforceStage, side: int, first_seed: int) -> None:
        self.stage, self.side, self.first_seed = stage, side, first_seed
        self._scene = lru_cache(SCENES_KEPT)(self._drawn)

    def dataset(self, count: int) -> Dataset:
        """`count` questions as trl reads them, each made when asked for; see `_rows`."""
        self.question(0)  # better now than in the middle of a run
        return Dataset.from_dict({"place": list(range(count))}).with_transform(self._rows)

    def question(self, place: int) -> tuple[Scene, Question]:
        """The scene and the question at `place`; a scene without a wanted question leaves its place to a later one.

        Raises RecipeError where so many scenes in a row have none that the kinds do not fit each other.
        """
        for step in range(MOST_EMPTY):
            scene = self._scene((place + step * self.stage.scenes // MOST_EMPTY) % self.stage.scenes)
            fitting = [q for q in scene.questions if not self.stage.questions or q.kind in self.stage.questions]
            if fitting:
                return scene, fitting[place % len(fitting)]
        raise RecipeError(
            f"stage {self.stage.name}: {MOST_EMPTY} scenes of {', '.join(self.stage.scene_kinds) or 'all kinds'} have "
            f"no question about {' or '.join(self.stage.questions)}; leave out questions or scene_kinds"
        )

    def _drawn(self, index: int) -> Scene:
        return make_scene(self.first_seed + index, self.side, kind_of(index, self.stage.scene_kinds))

    def _rows(self, batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        asked = [self.question(place) for place in batch["place"]]
        return {
            "prompt": [[user_message(question.question, 1)] for _, question in asked],
            "images": [[scene.image] for scene, _ in asked],
            "question": [question.question for _, question in asked],
            "answer": [question.answer for _, question in asked],
        }


def grpo_arguments(stage: ReinforceStage, folder: Path, weights: list[float]) -> GRPOConfig:
    """What `stage` says, in trl's words: the clipped objective of Shao et al. 2024, eq. 3; `weights` of the rewards.

    The advantage of an answer is its reward less the mean of its group, over the group's standard deviation.
    """
    schedule = stage.schedule
    said = arguments_of(schedule, folder / "checkpoints")
    said |= {"per_device_train_batch_size": schedule.batch_size * stage.answers}
    return GRPOConfig(
        **said,
        gradient_checkpointing=schedule.gradient_checkpointing,
        shuffle_dataset=False,  # the scenes are drawn by their numbers, so that resuming is exact
        num_generations=stage.answers,
        num_generations_eval=1,
        max_completion_length=stage.longest_answer,
        temperature=stage.temperature,
        beta=stage.beta,
        epsilon=stage.clip,
        loss_type="grpo",
        scale_rewards="group",
        reward_weights=weights,
    )
