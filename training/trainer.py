"""Run any objective on `transformers.Trainer`: the only training loop."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import PrinterCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from training.arguments import compile_layers, training_arguments
from training.cached_step import cached_step
from training.callbacks import AroundStep, HearsStop, KeepsLog, WeightDecay
from training.careful_trainer import CarefulTrainer
from training.config import Schedule
from training.data.tar_streams import StreamedViews
from training.diagnosis import Expected
from training.finite_steps import FiniteSteps
from training.gather import ranks
from training.meter import Meter
from training.monitors import FEWEST, TowerMonitor, in_words
from training.objective import Objective, WholeBatchObjective, total_loss
from training.progress import ProgressLine
from training.random_state import only_looking
from training.reporting import require_reporter
from training.run_log import RunLog
from training.sample_names import NAMES, CollatesNames
from training.sharding import is_sharded, load_whole_weights
from training.step_weight import SharesStepWeight
from training.stopping import StopRequest

WEIGHTS = "objective.safetensors"
PARTS = "parts"  # the key of a batch that comes in micro-batches


def freeze_all_but(objective: nn.Module, trained: set[str]) -> None:
    """Let exactly the parameters named in `trained` move. Raises ValueError when a name is unknown or none is named."""
    names = {name for name, _ in objective.named_parameters()}
    if not trained or trained - names:
        raise ValueError(f"cannot train {sorted(trained - names)[:3] or 'nothing'}: no such parameter")
    for name, parameter in objective.named_parameters():
        parameter.requires_grad_(name in trained)


class ObjectiveTrainer(SharesStepWeight, CarefulTrainer):
    """The trainer of an objective: samples come in the dataset's own order, so that resuming is exact."""

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        folder: Path,
        train: Dataset[Any],
        held_out: Dataset[Any],
        layer_decay: float = 1.0,
        monitor: TowerMonitor | None = None,
    ) -> None:
        """Checkpoints, log and curves go into `folder`; `monitor` looks at the tower on the way."""
        freeze_all_but(objective, objective.trained_parameters())
        self.layer_decay, self.schedule = layer_decay, schedule
        self.objective, self.monitor = objective, monitor
        streamed = isinstance(train, StreamedViews)
        log = RunLog(folder / "log.jsonl")
        self.progress = ProgressLine(folder.name)
        self.finite = FiniteSteps(objective, schedule.on_nan, log, self.progress.say)
        self.stop = StopRequest()
        super().__init__(
            model=objective,
            args=training_arguments(schedule, folder / "checkpoints", objective, streamed),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=_collator(objective, schedule),
            callbacks=[self.finite, AroundStep(objective, self.finite), WeightDecay(schedule), HearsStop(self.stop)],
        )
        self.samples_a_step = schedule.batch_size * schedule.accumulation * ranks()
        watched = objective.watched(self.samples_a_step)
        expected = Expected(schedule.steps, self.samples_a_step, watched.untaught, watched.largest, watched.finds)
        self.remove_callback(PrinterCallback)
        self.add_callback(KeepsLog(log, expected, self.progress.say))
        self.add_callback(self.progress)
        self.meter = Meter()
        self._names: list[str] = []  # of the samples of a micro-batch, or of all of a step
        self._looked: int | None = None  # the step of the last look

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Of a stream each rank reads its own share, and goes on where it stood without reading what came before."""
        if not isinstance(self.train_dataset, StreamedViews):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator(),  # else it draws from the state that a resumed run has to find as it was
        )

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
        inputs = dict(inputs)
        self._names = inputs.pop(NAMES)
        self._count(inputs.get(PARTS, [inputs]))
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
        numbers = {name: float(value.detach()) for name, value in values.items()}
        if self.finite.note(self._names, numbers):
            self.meter.note(numbers)

    def _count(self, parts: Sequence[Mapping[str, Any]]) -> None:
        tokens = [count for part in parts if (count := self.objective.tokens_of(part)) is not None]
        self.meter.trained_on(sum(tokens) if tokens else len(self._names), "tokens" if tokens else "samples")

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time that does not count as training; random state is as it was."""
        with self.meter.standing(), super()._not_training():
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the objective's own values and the speed to each training line."""
        if "loss" in logs:
            logs |= self.meter.line()
        super().log({name: value for name, value in logs.items() if math.isfinite(value)}, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one held-out batch."""
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != NAMES})
        parts = inputs.get(PARTS, [inputs])
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = [total_loss(model(**part)) for part in parts]
            return torch.stack(losses).mean(), None, None

    def look(self) -> None:
        """Let the monitor look at the tower, on the main process alone, where a look is due at this step."""
        step, last = self.state.global_step, self.state.max_steps
        if self.monitor is None or self._looked == step or (step % self.monitor.every and step != last):
            return
        first, self._looked = self._looked is None, step
        if not self.is_world_process_zero():
            return
        if is_sharded(self.objective) or self.monitor.pictures is None:
            if first:
                why = "FSDP spreads the weights" if is_sharded(self.objective) else f"fewer than {FEWEST} are held out"
                self.progress.say(f"no pictures are looked at while it trains: {why}")
            return
        with self.meter.standing(), only_looking(self.objective), self.compute_loss_context_manager():
            values = self.monitor.measure(self.objective.watched(self.samples_a_step))
        should_log = self.control.should_log  # logging takes it back, and the step's own line is still to come
        self.log(values)
        self.control.should_log = should_log
        self.progress.say(f"step {step}: {in_words(values)}")

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        self.look()
        super()._maybe_log_save_evaluate(*arguments, **named)

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        if self.state.global_step == 0:
            self.look()
        super()._run_epoch(*arguments, **named)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))
        else:  # FSDP's, gathered: tied weights stand in it twice
            once = dict.fromkeys(name for name, _ in chain(self.model.named_parameters(), self.model.named_buffers()))
            save_file({name: state_dict[name].contiguous() for name in once if name in state_dict}, folder / WEIGHTS)
        torch.save(self.args, folder / "training_args.bin")
        if self.monitor is not None:
            self.monitor.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model, weights = model or self.model, Path(resume_from_checkpoint) / WEIGHTS
        if is_sharded(model):
            load_whole_weights(model, load_file(weights))
        else:
            load_model(model, str(weights), strict=True)
        if self.monitor is not None:
            self.monitor.load(Path(resume_from_checkpoint))

    def starts_at(self, checkpoint: Path) -> None:
        """A stream passes over what the run has read, without reading it."""
        if isinstance(self.train_dataset, StreamedViews):
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            schedule = self.schedule
            self.train_dataset.go_on_after(state.global_step * schedule.batch_size * schedule.accumulation)


def _collator(objective: Objective, schedule: Schedule) -> Callable[[Sequence[Any]], Mapping[str, Any]]:
    """The objective's own; where a step of a whole-batch objective is accumulated, a list of micro-batches."""
    if schedule.accumulation == 1 or not isinstance(objective, WholeBatchObjective):
        return CollatesNames(objective.collate)
    size = schedule.batch_size

    def collate_parts(samples: Sequence[Any]) -> Mapping[str, Any]:
        return {PARTS: [objective.collate(samples[i : i + size]) for i in range(0, len(samples), size)]}

    return CollatesNames(collate_parts)


def train(
    objective: Objective,
    schedule: Schedule,
    train_set: Dataset[Any],
    held_out: Dataset[Any],
    folder: Path,
    layer_decay: float = 1.0,
    monitor: TowerMonitor | None = None,
) -> dict[str, float]:
    """Train `objective`, going on from the newest whole checkpoint in `folder`, and return its held-out scores.

    Raises:
        TrainingError: a loss that is not finite, no room on the disk, or no whole checkpoint among those there are.
        KeyboardInterrupt: a stop was requested; the checkpoint is saved.
    """
    require_reporter(schedule.report_to)
    folder.mkdir(parents=True, exist_ok=True)
    if schedule.gradient_checkpointing:
        objective.gradient_checkpointing_enable({"use_reentrant": False})
    if schedule.compile:
        compile_layers(objective)
    return ObjectiveTrainer(objective, schedule, folder, train_set, held_out, layer_decay, monitor).run(folder)
