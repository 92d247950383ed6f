"""Run any objective on `transformers.Trainer`: the only training loop."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from training.config import Schedule
from training.objective import Objective, total_loss

WEIGHTS = "objective.safetensors"


def freeze_all_but(objective: nn.Module, trained: set[str]) -> None:
    """Let exactly the parameters named in `trained` move. Raises ValueError when a name is unknown or none is named."""
    names = {name for name, _ in objective.named_parameters()}
    if not trained or trained - names:
        raise ValueError(f"cannot train {sorted(trained - names)[:3] or 'nothing'}: no such parameter")
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(name in trained)


def has_fast_bf16() -> bool:
    """Whether bf16 matrix products are faster than fp32 here (a GPU, or a CPU with avx512_bf16 or amx_bf16)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpu_facts = Path("/proc/cpuinfo")
    return cpu_facts.is_file() and any(flag in cpu_facts.read_text() for flag in ("avx512_bf16", "amx_bf16"))


@dataclass
class _Logged:
    """Sums of what the objective returned since the last log line."""

    sums: dict[str, float]
    count: int = 0


class ObjectiveTrainer(Trainer):
    """The trainer of an objective: samples come in the dataset's own order, so that resuming is exact."""

    def __init__(self, objective: Objective, arguments: TrainingArguments, train: Dataset[Any], held_out: Dataset[Any]):
        freeze_all_but(objective, objective.trained_parameters())
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=objective.collate,
            callbacks=[_AfterStep(objective), _WriteLog(Path(arguments.output_dir).parent / "log.jsonl")],
        )
        self._logged = _Logged({})

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a group for each rate that the objective asks for, with and without weight decay."""
        objective = self.accelerator.unwrap_model(self.model)
        decays = set(self.get_decay_parameter_names(objective))
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((objective.rate_of(name), name in decays), []).append(parameter)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind(
            [
                {"params": p, "lr": self.args.learning_rate * rate, "weight_decay": self.args.weight_decay * decayed}
                for (rate, decayed), p in groups.items()
            ],
            **settings,
        )
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **unused: Any
    ) -> Any:
        """The sum of the objective's losses; everything it returns goes to the log."""
        values = model(**inputs)
        for name, value in values.items():
            self._logged.sums[name] = self._logged.sums.get(name, 0.0) + float(value.detach())
        self._logged.count += 1
        loss = total_loss(values)
        return (loss, values) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the objective's own values to each training line."""
        if "loss" in logs and self._logged.count:
            logs |= {name: round(value / self._logged.count, 5) for name, value in self._logged.sums.items()}
            self._logged = _Logged({})
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one held-out batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return total_loss(model(**inputs)).detach(), None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_model(model or self.model, str(Path(resume_from_checkpoint) / WEIGHTS), strict=True)


class _AfterStep(TrainerCallback):
    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_optimizer_step(self, *unused: Any, **more: Any) -> None:
        self.objective.after_step()


class _WriteLog(TrainerCallback):
    """Appends every log line to a file that outlives the run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        with self.file.open("a") as sink:
            sink.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def train(
    objective: Objective, schedule: Schedule, train_set: Dataset[Any], held_out: Dataset[Any], folder: Path
) -> dict[str, float]:
    """Train `objective`, going on from the newest checkpoint in `folder`, and return its held-out scores."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = ObjectiveTrainer(objective, training_arguments(schedule, folder / "checkpoints"), train_set, held_out)
    checkpoints = folder / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
    return trainer.evaluate()


def training_arguments(schedule: Schedule, checkpoints: Path) -> TrainingArguments:
    """What `schedule` says, in transformers' words."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulation,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": schedule.final_rate},
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        adam_beta2=schedule.beta2,
        max_grad_norm=1.0,
        bf16=has_fast_bf16() if schedule.bf16 is None else schedule.bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=schedule.log_every,
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=schedule.evaluate_every,
        save_strategy="steps",
        save_steps=schedule.save_every,
        save_total_limit=2,
        dataloader_num_workers=schedule.workers,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=[],
        seed=schedule.seed,
        data_seed=schedule.seed,
        report_to="none",
        log_level="warning",
    )
