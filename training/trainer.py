"""Run any objective on `transformers.Trainer`: the only training loop."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from training.cached_step import cached_step
from training.config import Schedule
from training.data.tar_streams import StreamedViews
from training.objective import Objective, WholeBatchObjective, total_loss
from training.schedules import cosine
from training.sharding import is_sharded, load_whole_weights

WEIGHTS = "objective.safetensors"
PARTS = "parts"  # the key of a batch that comes in micro-batches


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


@dataclass
class _Logged:
    """Sums of what the objective returned since the last log line."""

    sums: dict[str, float]
    count: int = 0


class ObjectiveTrainer(Trainer):
    """The trainer of an objective: samples come in the dataset's own order, so that resuming is exact."""

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        folder: Path,
        train: Dataset[Any],
        held_out: Dataset[Any],
        layer_decay: float = 1.0,
    ) -> None:
        freeze_all_but(objective, objective.trained_parameters())
        self.layer_decay = layer_decay
        super().__init__(
            model=objective,
            args=training_arguments(schedule, folder / "checkpoints", objective),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=_collator(objective, schedule),
            callbacks=[_AroundStep(objective), _WeightDecay(schedule), _WriteLog(folder / "log.jsonl")],
        )
        self._logged = _Logged({})

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of a stream each rank reads its own share, and goes on where it stood without reading what came before."""
        if not isinstance(self.train_dataset, StreamedViews):
            return super().get_train_dataloader()
        self.args.ignore_data_skip = True
        size, workers = self.args.per_device_train_batch_size, self.args.dataloader_num_workers
        return DataLoader(self.train_dataset, size, collate_fn=self.data_collator, num_workers=workers)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a group for each rate, with and without weight decay.

        The rate is what the objective asks for, times `layer_decay` for each layer above the parameter.
        """
        objective = self.accelerator.unwrap_model(self.model)
        decays = set(self.get_decay_parameter_names(objective))
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                rate = objective.rate_of(name) * self.layer_decay ** objective.layers_above(name)
                groups.setdefault((rate, name in decays), []).append(parameter)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = kind(
            [
                {
                    "params": p,
                    "lr": self.args.learning_rate * rate,
                    "weight_decay": self.args.weight_decay * decayed,
                    "decays": decayed,
                }
                for (rate, decayed), p in groups.items()
            ],
            **settings,
        )
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward; of several parts at once where the loss compares them with each other."""
        if PARTS not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        values = cached_step(model, self._prepare_inputs(inputs)[PARTS])
        self._note(values)
        return total_loss(values)

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, **unused: Any
    ) -> Any:
        """The sum of the objective's losses; everything it returns goes to the log."""
        values = model(**inputs)
        self._note(values)
        loss = total_loss(values)
        return (loss, values) if return_outputs else loss

    def _note(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._logged.sums[name] = self._logged.sums.get(name, 0.0) + float(value.detach())
        self._logged.count += 1

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
        parts = inputs.get(PARTS, [inputs])
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [total_loss(model(**part)) for part in parts]
            return torch.stack(losses).mean(), None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))
        else:  # FSDP's, gathered: tied weights stand in it twice
            once = dict.fromkeys(name for name, _ in chain(self.model.named_parameters(), self.model.named_buffers()))
            save_file({name: state_dict[name].contiguous() for name in once if name in state_dict}, folder / WEIGHTS)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model, weights = model or self.model, Path(resume_from_checkpoint) / WEIGHTS
        if is_sharded(model):
            load_whole_weights(model, load_file(weights))
        else:
            load_model(model, str(weights), strict=True)


def _collator(objective: Objective, schedule: Schedule) -> Callable[[Sequence[Any]], Mapping[str, Any]]:
    """The objective's own; where a step of a whole-batch objective is accumulated, a list of micro-batches."""
    if schedule.accumulation == 1 or not isinstance(objective, WholeBatchObjective):
        return objective.collate
    size = schedule.batch_size

    def collate_parts(samples: Sequence[Any]) -> Mapping[str, Any]:
        return {PARTS: [objective.collate(samples[i : i + size]) for i in range(0, len(samples), size)]}

    return collate_parts


class _AroundStep(TrainerCallback):
    """Tells the objective where the run stands."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.objective.begin_step(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.objective.before_update(state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.objective.after_step(state.global_step, state.max_steps)


class _WeightDecay(TrainerCallback):
    """Moves the weight decay along a cosine, as DINO does (Caron et al. 2021, section 3.1)."""

    def __init__(self, schedule: Schedule) -> None:
        self.start, self.end = schedule.weight_decay, schedule.final_weight_decay

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **unused: Any) -> None:
        if self.end is None:
            return
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = cosine(self.start, self.end, state.global_step, state.max_steps)


class _WriteLog(TrainerCallback):
    """Appends every log line to a file that outlives the run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self.file.open("a") as sink:
            sink.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def train(
    objective: Objective,
    schedule: Schedule,
    train_set: Dataset[Any],
    held_out: Dataset[Any],
    folder: Path,
    layer_decay: float = 1.0,
) -> dict[str, float]:
    """Train `objective`, going on from the newest checkpoint in `folder`, and return its held-out scores."""
    folder.mkdir(parents=True, exist_ok=True)
    if schedule.gradient_checkpointing:
        objective.gradient_checkpointing_enable({"use_reentrant": False})
    if schedule.compile:
        compile_layers(objective)
    trainer = ObjectiveTrainer(objective, schedule, folder, train_set, held_out, layer_decay)
    checkpoints = folder / "checkpoints"
    newest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if newest and isinstance(train_set, StreamedViews):
        state = TrainerState.load_from_json(str(Path(newest) / TRAINER_STATE_NAME))
        train_set.go_on_after(state.global_step * schedule.batch_size * schedule.accumulation)
    trainer.train(resume_from_checkpoint=newest)
    return trainer.evaluate()


def loader_batch(schedule: Schedule, objective: Objective) -> int:
    """Samples that come at once: all of a step where the step itself splits them, else one micro-batch."""
    return schedule.batch_size * (schedule.accumulation if isinstance(objective, WholeBatchObjective) else 1)


def training_arguments(schedule: Schedule, checkpoints: Path, objective: Objective) -> TrainingArguments:
    """What `schedule` says, in transformers' words."""
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=schedule.steps,
        per_device_train_batch_size=loader_batch(schedule, objective),
        per_device_eval_batch_size=schedule.batch_size,
        gradient_accumulation_steps=1 if isinstance(objective, WholeBatchObjective) else schedule.accumulation,
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
