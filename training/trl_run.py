"""Run a trainer of trl as our own runs go: our checkpoints, log, curves and progress, and nothing sent to anybody."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import PrinterCallback

from assistant.checkpoint import load_llava
from assistant.exporting import require_unquantised
from assistant.fusion import squeeze_pictures
from assistant.models import JOEY, ModelError, find_model
from assistant.projectors import Llava
from assistant.tiles import Processor, is_tiled
from training.adapters import Adapter, export_adapted, planned_lora
from training.arguments import is_mixed
from training.callbacks import HearsStop, KeepsLog
from training.careful_trainer import CarefulTrainer
from training.config import RecipeError
from training.diagnosis import Expected
from training.finite_steps import FiniteSteps
from training.gather import ranks
from training.preference_stages import PreferenceStage, ReinforceStage, RewardStage
from training.progress import ProgressLine
from training.reporting import require_reporter
from training.run_log import RunLog
from training.stages import Workshop
from training.stopping import StopRequest

AfterTuning = PreferenceStage | RewardStage | ReinforceStage


def started(stage: AfterTuning, workshop: Workshop) -> tuple[Llava, Processor, Adapter]:
    """The model that `stage` goes on with, its processor, and the adapter that is to stand on it, not yet injected.

    Raises RecipeError where the model cannot be had, cuts pictures into tiles, or the adapter hits nothing.
    """
    source = JOEY.absolute() if stage.start_from is None else workshop.named(stage.start_from)
    try:
        folder = find_model(source)
        require_unquantised(folder, "taught")
        model, processor = load_llava(folder)
        squeeze_pictures(model, processor)
        name = str(Path(source).absolute()) if Path(source).is_dir() else str(source)
        adapter = planned_lora(model, stage.lora, folder, name)
    except (ModelError, ValueError) as error:
        raise RecipeError(f"stage {stage.name}: {error}") from error
    if is_tiled(processor):
        raise RecipeError(f"stage {stage.name}: {name} cuts pictures into tiles, which only instruct stages can train")
    if stage.still == "bfloat16" and is_mixed(stage.schedule):
        model.to(torch.bfloat16)
    return model, processor, adapter


def injected(model: Llava, adapter: Adapter) -> None:
    """Put `adapter` on `model`, in place, in float32 whatever the model is held in."""
    inject_adapter_in_model(adapter.config, model)
    own = dict(model.named_parameters())
    for name in adapter.parameters():
        own[name].data = own[name].data.float()


class TrlRun(CarefulTrainer):
    """What stands before a trainer of trl among the bases."""

    names: ClassVar[Mapping[str, str]] = {}  # trl's names of what is noted, and ours
    shown: ClassVar[Sequence[str]] = ()  # of ours, beside the loss in the progress line
    _metrics: dict[str, defaultdict[str, list[float]]]  # trl's, of training and of evaluation

    def join_house(self, stage: AfterTuning, folder: Path, samples: int) -> None:
        """Put our callbacks in place; log and curves go into `folder`, and `samples` are those of a step and rank."""
        require_reporter(stage.schedule.report_to)
        log = RunLog(folder / "log.jsonl")
        self.stop = StopRequest()
        self.progress = ProgressLine(folder.name, shown=self.shown)
        self.finite = FiniteSteps(self.model, stage.schedule.on_nan, log, self.progress.say)
        expected = Expected(stage.schedule.steps, samples * ranks(), {}, {})
        self.remove_callback(PrinterCallback)
        for callback in (self.finite, HearsStop(self.stop), KeepsLog(log, expected, self.progress.say), self.progress):
            self.add_callback(callback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What trl noted comes under our names, what has none is left out, and so is what is no number."""
        mode = "train" if self.model.training else "eval"
        noted = {self.names[name]: values for name, values in self._metrics[mode].items() if name in self.names}
        self._metrics[mode] = defaultdict(list, noted)
        super().log({name: value for name, value in logs.items() if math.isfinite(value)}, start_time)

    def counted(self, batch: Any) -> tuple[int, int]:
        """Tokens that the step on `batch`, just done, read without padding, and those of them that are answers."""
        return token_counts_of(batch)

    def _send_telemetry(self) -> None:
        """trl would tell its makers what is trained here; nothing leaves this machine unasked."""

    def create_model_card(self, *unused: Any, **named: Any) -> None:
        """trl would write a card beside every checkpoint; ours is written with the finished model."""


def run_and_export(trainer: TrlRun, adapter: Adapter, folder: Path) -> dict[str, float]:
    """Train to the end and write the adapter, and base and adapter as one model; returns the held-out scores.

    All of it goes into `folder`, what comes out into its `output`.
    """
    scores = trainer.run(folder)
    state = PartialState()
    if state.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
        export_adapted(model, adapter, set(), folder / "output")
    state.wait_for_everyone()
    return scores


def token_counts_of(batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Tokens of a batch without padding, and those of them that are answers."""
    return int(batch["attention_mask"].sum()), int(batch["completion_mask"].sum())
