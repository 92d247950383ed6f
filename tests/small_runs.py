"""Runs of a few steps on pictures drawn once, through the one trainer, for tests of what happens on the way."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import set_seed

from tests.test_pretraining import stage_of
from training.config import Monitor, TowerStage
from training.data.pictures import Picture
from training.data.samples import Mixture
from training.data.sources import ScenePictures
from training.monitors import TowerMonitor
from training.objective import Objective
from training.stages import Workshop, build_tower_objective, view_mixture
from training.trainer import train

SIDE = 32
HELD_OUT = 10**6  # seed of the first held-out scene


@cache
def scenes(count: int, use: str = "pictures", first: int = 0) -> list[Picture]:
    """That many generated scenes, drawn once for all tests of a process."""
    drawn = ScenePictures(count, SIDE, use, first)
    return [drawn[place] for place in range(count)]


def use_of(stage: TowerStage) -> str:
    """What the pictures of `stage` are for."""
    return stage.mixture[0].use


def small_stage(name: str, steps: int, /, **changes: Any) -> TowerStage:
    """The tiny stage of an objective: `steps` of 16 pictures, a log line for every second."""
    schedule = {"steps": steps, "batch_size": 16, "log_every": 2, "warmup_steps": 5}
    schedule |= {"save_every": 1000, "evaluate_every": 1000} | changes.pop("schedule", {})
    return stage_of(name, schedule=schedule, **changes)


def small_run(
    stage: TowerStage,
    runs: Path,
    folder: Path,
    monitor: Monitor | None = None,
    change: Callable[[Objective], Any] = lambda objective: None,
    spoil: Callable[[Mixture[Any]], Any] = lambda samples: samples,
) -> Objective:
    """Train `stage` in `folder` and give its objective back; `runs` holds a tokenizer for those that read.

    `change` is done to the new objective, and `spoil` to what it trains on.
    """
    set_seed(1)
    objective = build_tower_objective(stage, Workshop(runs, None))
    change(objective)
    use, schedule = use_of(stage), stage.schedule
    total = schedule.steps * schedule.batch_size * schedule.accumulation
    training, held_out = scenes(96, use), scenes(48, use, HELD_OUT)
    samples = view_mixture(objective, [training], stage.mixture[:1], total, 1)
    others = view_mixture(objective, [held_out], stage.mixture[:1], 16, 1)
    looks = None if monitor is None else TowerMonitor(monitor, SIDE, 48, [held_out])
    train(objective, schedule, spoil(samples), others, folder, monitor=looks)
    return objective


def logged(folder: Path, name: str = "step") -> list[dict[str, Any]]:
    """The lines of the log in `folder` that have `name`."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


def diagnoses(folder: Path) -> list[str]:
    """What was said to go wrong, in its order."""
    return [line["diagnosis"] for line in logged(folder, "diagnosis")]


def weights_in(folder: Path, step: int) -> dict[str, Tensor]:
    """The weights in the checkpoint of `step`."""
    return load_file(folder / "checkpoints" / f"checkpoint-{step}" / "objective.safetensors")


def assert_same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal to the bit."""
    assert first.keys() == second.keys()
    different = [name for name, weight in first.items() if not torch.equal(weight, second[name])]
    assert different == []


def assert_same_gradients(first: dict[str, Tensor], second: dict[str, Tensor], absolute: float = 1e-6) -> None:
    """Of the same parameters, and equal but for the order of additions."""
    assert first.keys() == second.keys()
    for name, gradient in second.items():
        assert torch.allclose(first[name], gradient, rtol=1e-3, atol=absolute), name
