"""Stop, or leave a step out, when its loss or gradient is not finite, and name its samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from transformers import TrainerCallback

from training.config import TrainingError
from training.gather import any_rank, ranks
from training.run_log import RunLog

MOST_SKIPPED = 10  # steps one after the other; after so many the weights themselves are at fault
NAMED = 16  # samples in a message; the log has all of them


class FiniteSteps(TrainerCallback):
    """Looks at each step before it changes a weight; all ranks decide alike.

    A step that is left out changes no weight, no buffer and no teacher; only its place in the schedule is used up.
    """

    def __init__(
        self, objective: nn.Module, on_nan: Literal["stop", "skip"], log: RunLog, say: Callable[[str], None]
    ) -> None:
        self.objective, self.on_nan, self.log, self.say = objective, on_nan, log, say
        self.skipping = False  # this step
        self.skipped = 0  # steps one after the other
        self.gradient_norm = 0.0  # of this step, before it is clipped
        self._bad: dict[str, float] = {}
        self._names_of_bad: list[str] = []
        self._names: list[str] = []
        self._buffers: list[Tensor] = []

    def note(self, names: Sequence[str], values: Mapping[str, float]) -> bool:
        """Take in what a micro-batch of samples called `names` returned, and say whether its losses are finite."""
        bad = {name: value for name, value in values.items() if name.endswith("_loss") and not math.isfinite(value)}
        self._names += names
        if bad:
            self._bad |= bad
            self._names_of_bad += names
        return not bad

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Forget the step before; keep the buffers that this one may spoil."""
        self.skipping, self._bad, self._names_of_bad, self._names = False, {}, [], []
        if self.on_nan == "skip":
            self._buffers = [buffer.clone() for buffer in self.objective.buffers()]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Leave the step out where it is not finite on any rank, or raise TrainingError."""
        if not any_rank(bool(self._bad) or not math.isfinite(self.gradient_norm), args.device):
            self.skipped = 0
            return
        step = state.global_step + 1
        what, names = self._at_fault()
        if state.is_world_process_zero:
            self.log.append({"step": step, "not_finite": what, "samples": names, "on_nan": self.on_nan})
        said = f"step {step}: {what} is not finite, with the samples {_listed(names)}"
        self.skipped += 1
        if self.on_nan == "stop":
            raise TrainingError(
                f"{said}. It changed no weight, and the same command goes on from the newest checkpoint. Look at these "
                "samples, lower learning_rate, or say on_nan: skip in the schedule to leave such steps out"
            )
        if self.skipped >= MOST_SKIPPED:
            raise TrainingError(
                f"{said}; so were the {MOST_SKIPPED - 1} steps before, and none was used. Lower learning_rate, and "
                "delete the newest checkpoints where the weights in them are at fault"
            )
        self._leave_out()
        if state.is_world_process_zero:
            self.say(f"{said}. It was left out (on_nan: skip).")

    def _leave_out(self) -> None:
        self.skipping = True
        for parameter in self.objective.parameters():
            parameter.grad = None  # the optimiser passes over it; zeros would still decay and average
        with torch.no_grad():
            for buffer, before in zip(self.objective.buffers(), self._buffers, strict=True):
                buffer.copy_(before)

    def _at_fault(self) -> tuple[str, list[str]]:
        """What is not finite on any rank, and the samples of these; of all where it is the gradient alone."""
        own = (self._bad, self._names_of_bad, self._names)
        everyone: list[Any] = [own] * ranks()
        if ranks() > 1:
            distributed.all_gather_object(everyone, own)
        bad = {name: value for losses, _, _ in everyone for name, value in losses.items()}
        what = " and ".join(f"{name} ({value})" for name, value in bad.items())
        names = [name for _, some, every in everyone for name in (some if bad else every)]
        return what or f"the gradient ({self.gradient_norm})", names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
