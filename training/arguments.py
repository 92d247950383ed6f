"""What a schedule says, in the words of transformers and torch."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from training.config import Schedule
from training.objective import Objective, WholeBatchObjective

KEPT = 2  # checkpoints of a run


def has_fast_bf16() -> bool:
    """Whether bf16 matrix products are faster than fp32 here (a GPU, or a CPU with avx512_bf16 or amx_bf16)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpu_facts = Path("/proc/cpuinfo")
    return cpu_facts.is_file() and any(flag in cpu_facts.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def compile_layers(objective: nn.Module) -> None:
    """Compile each layer of each stack of layers in place; names and weights stay as they are.

    Layer by layer, because compiling a whole model takes minutes, and lengths that change would start it again. Raises
    ValueError where there is no C++ compiler.
    """
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise ValueError("compile: true needs a C++ compiler: install g++, or say compile: false in the schedule")
    for stack in objective.modules():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                layer.compile()


def loader_batch(schedule: Schedule, objective: Objective) -> int:
    """Samples that come at once: all of a step where the step itself splits them, else one micro-batch."""
    return schedule.batch_size * (schedule.accumulation if isinstance(objective, WholeBatchObjective) else 1)


def training_arguments(
    schedule: Schedule, checkpoints: Path, objective: Objective, streamed: bool = False
) -> TrainingArguments:
    """What `schedule` says, in transformers' words; of a `streamed` set nothing is read only to be passed over."""
    said = arguments_of(schedule, checkpoints) | {"ignore_data_skip": streamed}
    said["per_device_train_batch_size"] = loader_batch(schedule, objective)
    if isinstance(objective, WholeBatchObjective):
        said["gradient_accumulation_steps"] = 1
    return TrainingArguments(**said)


def arguments_of(schedule: Schedule, checkpoints: Path) -> dict[str, Any]:
    """What `schedule` says as keyword arguments of TrainingArguments, and of the classes that are made from it."""
    return {
        "output_dir": str(checkpoints),
        "max_steps": schedule.steps,
        "per_device_train_batch_size": schedule.batch_size,
        "per_device_eval_batch_size": schedule.batch_size,
        "gradient_accumulation_steps": schedule.accumulation,
        "learning_rate": schedule.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": schedule.final_rate},
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": schedule.weight_decay,
        "adam_beta2": schedule.beta2,
        "max_grad_norm": 1.0,
        "bf16": is_mixed(schedule),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": schedule.log_every,
        "logging_first_step": True,
        "eval_strategy": "steps",
        "eval_steps": schedule.evaluate_every,
        "save_strategy": "steps",
        "save_steps": schedule.save_every,
        "save_total_limit": KEPT,
        "dataloader_num_workers": schedule.workers,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": [],
        "seed": schedule.seed,
        "data_seed": schedule.seed,
        "report_to": schedule.report_to,
        "run_name": checkpoints.parent.name,
        "project": "kangaroo",
        "disable_tqdm": True,
        "log_level": "warning",
    }


def is_mixed(schedule: Schedule) -> bool:
    """Whether a run trains in mixed precision: as `schedule` says, else where that is fast."""
    return has_fast_bf16() if schedule.bf16 is None else schedule.bf16
