"""Show how far a run is: one live line in a terminal, a line of text for each log line elsewhere."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

RATES = {"samples_per_second": "samples/s", "tokens_per_second": "tokens/s"}


class ProgressLine(TrainerCallback):
    """Step, loss, speed and the time that is left, on the main process and on standard error."""

    def __init__(self, name: str, console: Console | None = None, shown: Sequence[str] = ()) -> None:
        """`name` is that of the stage; `shown` are names in the log whose numbers stand beside the loss."""
        self.name, self.shown = name, shown
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._first_step, self._began = 0, 0.0

    def say(self, words: str) -> None:
        """A line of its own that stays."""
        self.console.print(words, markup=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Begin the line where the run goes on."""
        if not state.is_world_process_zero:
            return
        self._first_step, self._began = state.global_step, time.monotonic()
        if not self.console.is_terminal:
            return
        name, said, left = (TextColumn(text) for text in ("{task.description}", "{task.fields[said]}", "left"))
        columns = (name, BarColumn(12), MofNCompleteColumn(), said, TimeRemainingColumn(), left)
        self._bar = Progress(*columns, console=self.console)
        self._bar.add_task(self.name, total=state.max_steps, completed=state.global_step, said="")
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        """Show the newest loss and speed; a held-out loss gets a line that stays."""
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self.say(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4g}")
        if "loss" not in logs:
            return
        said = f"loss {logs['loss']:.4g}"
        said += "".join(f", {name} {logs[name]:.3g}" for name in self.shown if name in logs)
        said += "".join(f", {logs[rate]:,.0f} {unit}" for rate, unit in RATES.items() if rate in logs)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], said=said)
        elif not self.console.is_terminal:
            self.say(f"step {state.global_step} of {state.max_steps}: {said}, {self._left(state)} left")

    def _left(self, state: Any) -> timedelta:
        done = state.global_step - self._first_step
        seconds = (time.monotonic() - self._began) / max(1, done) * (state.max_steps - state.global_step)
        return timedelta(seconds=round(seconds))

    def on_train_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """End the live line."""
        self.close()

    def close(self) -> None:
        """End the live line where there is one, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
