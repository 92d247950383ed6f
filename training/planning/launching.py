"""Write down how a planned step is launched: the changed recipe, a configuration for accelerate, and the commands."""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel

from training.config import Recipe, RecipeError, Schedule
from training.objective import Objective
from training.planning.costs import Step

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
PORT = 29500  # torch's own choice


def bytes_in(said: str, option: str) -> float:
    """`80GB`, `141GiB` or `50GB/s` in bytes; a small b is bits, as networks are sold. Raises RecipeError."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)([bB])(?:/s|ps)?\s*", said, re.IGNORECASE)
    try:
        value = float(found[1]) if found else 0.0
    except ValueError:
        value = 0.0
    if found is None or not value > 0:
        raise RecipeError(f"{option} {said!r} is no size: write it as 80GB, 141GiB, 50GB/s or 400Gb/s")
    return value * UNITS[found[2].lower()] / (8 if found[3] == "b" else 1)


@dataclass(frozen=True)
class Rates:
    """What the learning rate becomes where a step grows from `before` to `after` samples."""

    before: int
    after: int
    root: float  # rate x root of the growth: for AdamW
    linear: float  # rate x growth: for SGD, and where authors use it with AdamW


def rates_for(schedule: Schedule, all_samples: int) -> Rates:
    """The square-root rule (Malladi et al. 2022, for Adam; DINOv2's code) and the linear one (Goyal et al. 2017).

    The recipe's rate belongs to its own step on one process.
    """
    before = schedule.batch_size * schedule.accumulation
    growth = all_samples / before
    return Rates(before, all_samples, schedule.learning_rate * math.sqrt(growth), schedule.learning_rate * growth)


def launched_recipe(recipe: Recipe, step: Step, steps: int | None = None) -> Recipe:
    """`recipe` with the schedule of `step`: its batch, the square-root rate, and `steps`.

    Where those are not said, there are as many as see the samples that the recipe's own would. Warm-up, evaluations
    and checkpoints keep their share of the steps.
    """
    schedule = step.stage.schedule
    rates = rates_for(schedule, step.all_samples)
    shrink = rates.before / rates.after if steps is None else steps / schedule.steps

    def fewer(steps: int, least: int) -> int:
        return max(least, round(steps * shrink))

    changed = schedule.model_copy(
        update={
            "batch_size": step.samples,
            "accumulation": step.accumulation,
            "learning_rate": float(f"{rates.root:.3g}"),
            "steps": fewer(schedule.steps, 1),
            "warmup_steps": fewer(schedule.warmup_steps, 0),
            "evaluate_every": fewer(schedule.evaluate_every, 1),
            "save_every": fewer(schedule.save_every, 1),
            "gradient_checkpointing": step.way.checkpointed,
        }
    )
    stages = tuple(
        stage.model_copy(update={"schedule": changed}) if stage.name == step.stage.name else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"name": f"{recipe.name}-{step.devices}", "stages": stages})


def write_recipe(recipe: Recipe, file: Path) -> None:
    """`recipe` as a file that `kangaroo train` reads, without what is at its default."""
    said = recipe.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(said, sort_keys=False, width=120, allow_unicode=True))


def layer_classes(objective: Objective) -> list[str]:
    """The classes of the layers in transformers' models, by name: FSDP shards these one by one."""
    models = [module for module in objective.modules() if isinstance(module, PreTrainedModel)]
    stacks = [stack for model in models for stack in model.modules() if isinstance(stack, nn.ModuleList)]
    return sorted({type(layer).__name__ for stack in stacks for layer in stack})


def fsdp_config(objective: Objective, step: Step, per_machine: int) -> str:
    """accelerate's configuration file for FSDP2."""
    sharding = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": ",".join(layer_classes(objective)),
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,  # the recipe's own gradient_checkpointing does it
    }
    return _accelerate_config(step, per_machine, "FSDP", {"fsdp_config": sharding})


def deepspeed_config(step: Step, per_machine: int) -> str:
    """accelerate's configuration file for DeepSpeed's ZeRO-2: gradients and AdamW's state are in shards, weights whole.

    ZeRO-3, which shards weights too, is left to FSDP2: checkpoints and exports of ours would not find whole weights.
    """
    zero = {
        "zero_stage": 2,
        "gradient_clipping": 1.0,  # as our trainer does without it
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": False,
        "deepspeed_multinode_launcher": "standard",
    }
    return _accelerate_config(step, per_machine, "DEEPSPEED", {"deepspeed_config": zero})


def _accelerate_config(step: Step, per_machine: int, kind: str, section: dict[str, Any]) -> str:
    said = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "mixed_precision": "bf16" if step.half else "no",
        "num_machines": machines(step.devices, per_machine),
        "num_processes": step.devices,
        "rdzv_backend": "c10d",
        "same_network": True,
        **section,
    }
    return yaml.safe_dump(said, sort_keys=False)


def machines(devices: int, per_machine: int) -> int:
    """How many machines hold `devices`. Raises RecipeError where they do not divide."""
    if devices > per_machine and devices % per_machine:
        raise RecipeError(f"--devices {devices} does not divide into machines of {per_machine}: see --per-machine")
    return max(1, devices // per_machine)


def commands(step: Step, recipe: str, config: Path | None, per_machine: int, data: str = "DATA") -> list[str]:
    """How to start `recipe` on every machine, by each launcher.

    `config` is accelerate's file: for FSDP, which starts in no other way, or else for DeepSpeed, which is one way more.
    """
    count, file = machines(step.devices, per_machine), shlex.quote(recipe)
    train = f"-m ui.command_line train {file} --data {data}"
    meeting = f" --machine_rank $RANK --main_process_ip $FIRST --main_process_port {PORT}" if count > 1 else ""
    if step.devices == 1:
        return [f"kangaroo train {file} --data {data}"]
    configured = (
        [] if config is None else [f"accelerate launch --config_file {shlex.quote(str(config))}{meeting} {train}"]
    )
    if step.way.sharded:
        return configured
    accelerate = f"accelerate launch --multi_gpu --num_machines {count} --num_processes {step.devices}{meeting} {train}"
    if count == 1:
        return [f"torchrun --nproc-per-node {step.devices} {train}", accelerate, *configured]
    rendezvous = f"--rdzv-id kangaroo --rdzv-backend c10d --rdzv-endpoint $FIRST:{PORT}"
    return [f"torchrun --nnodes {count} --nproc-per-node {per_machine} {rendezvous} {train}", accelerate, *configured]
