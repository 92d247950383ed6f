"""Run the stages behind instruction tuning; what each needs is imported when it runs, for trl takes seconds to load."""

import warnings

from training.preference_stages import PreferenceStage, ReinforceStage, RewardStage
from training.stages import Workshop


def run_after_tuning(stage: PreferenceStage | RewardStage | ReinforceStage, workshop: Workshop) -> dict[str, float]:
    """Train `stage`, export what came of it, and return its held-out scores."""
    hush_trl()
    match stage:
        case PreferenceStage():
            from training.preference import run_preference

            return run_preference(stage, workshop)
        case RewardStage():
            from training.reward import run_reward

            return run_reward(stage, workshop)
        case ReinforceStage():
            from training.reinforce import run_reinforce

            return run_reinforce(stage, workshop)


def hush_trl() -> None:
    """trl warns of every vLLM newer than itself, also where it is not asked to use it."""
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions", category=UserWarning)
