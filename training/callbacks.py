"""What goes on around the steps of a run: the objective is told, decay moves, the log is kept, a stop is heard."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from training.config import Schedule
from training.curves import draw_curves
from training.diagnosis import Expected, diagnose
from training.finite_steps import FiniteSteps
from training.gather import any_rank
from training.objective import Objective
from training.run_log import Line, RunLog
from training.schedules import cosine
from training.stopping import StopRequest

CURVES = "curves.png"
SECONDS_BETWEEN_DRAWINGS = 20.0  # drawing takes up to one; a run that saves at every step would do little else


class AroundStep(TrainerCallback):
    """Tells the objective where the run stands."""

    def __init__(self, objective: Objective, finite: FiniteSteps) -> None:
        self.objective, self.finite = objective, finite

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Before the first forward of a step."""
        self.objective.begin_step(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """When all gradients are there."""
        self.objective.before_update(state.global_step, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """When the weights have moved; not where the step was left out."""
        if not self.finite.skipping:
            self.objective.after_step(state.global_step, state.max_steps)


class WeightDecay(TrainerCallback):
    """Moves the weight decay along a cosine, as DINO does (Caron et al. 2021, section 3.1)."""

    def __init__(self, schedule: Schedule) -> None:
        self.start, self.end = schedule.weight_decay, schedule.final_weight_decay

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **unused: Any) -> None:
        """Set it for the coming step."""
        if self.end is None:
            return
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = cosine(self.start, self.end, state.global_step, state.max_steps)


class HearsStop(TrainerCallback):
    """Ends the run behind the step in which a stop was requested of any rank, with a checkpoint."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """All ranks stop at the same step."""
        if any_rank(self.request.made, args.device):
            self.request.made = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class KeepsLog(TrainerCallback):
    """On the main process: writes every line, says what goes wrong the first time it shows, and draws the curves."""

    def __init__(self, log: RunLog, expected: Expected, say: Callable[[str], None]) -> None:
        """The curves come beside the file of `log`."""
        self.log, self.expected, self.say = log, expected, say
        self.lines: list[Line] = []
        self._drawn = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Go on with the lines until the step that the run goes on from; what was said there is not said again."""
        self._drawn = time.monotonic()
        if state.is_world_process_zero:
            self.lines = self.log.lines(up_to=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        """Write the line; then see what the log says by now."""
        if not state.is_world_process_zero:
            return
        self._keep({"step": state.global_step, **logs})
        said = {line["diagnosis"] for line in self.lines if "diagnosis" in line}
        for finding in diagnose(self.lines, self.expected):
            if finding.kind not in said:
                self._keep({"step": state.global_step, "diagnosis": finding.kind, "words": finding.words})
                self.say(f"step {state.global_step}: {finding.words}")

    def _keep(self, line: Line) -> None:
        self.log.append(line)
        self.lines.append(line)

    def on_save(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Draw the curves, unless the run has only begun, or that was just done."""
        if state.is_world_process_zero and time.monotonic() - self._drawn > SECONDS_BETWEEN_DRAWINGS:
            self.draw()

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Draw them at the end."""
        if state.is_world_process_zero:
            self.draw()

    def draw(self) -> None:
        """Write the curves."""
        folder: Path = self.log.file.parent
        draw_curves(self.lines, folder.name, folder / CURVES)
        self._drawn = time.monotonic()
