"""What every run does around transformers' training loop: whole checkpoints, a stop that is heard, exact resuming."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from training.checkpoints import PARTIAL, keeps_the_one_before, newest_whole, plain_words_when_full, publish
from training.finite_steps import FiniteSteps
from training.progress import ProgressLine
from training.random_state import kept_random_state
from training.stopping import StopRequest


class CarefulTrainer(Trainer):
    """A trainer whose checkpoints are whole or not there; it can stand before a library's own trainer among the bases.

    A subclass sets `progress`, `finite` and `stop` before anything trains.
    """

    progress: ProgressLine
    finite: FiniteSteps
    stop: StopRequest
    _writing: Path | None = None

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Random state is as it was."""
        with kept_random_state():
            yield

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self.finite.gradient_norm = 0.0 if norm is None else float(norm)  # DeepSpeed clips and counts by itself
        return norm

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """The held-out scores; random state stays, so that a run which skips an evaluation is the same run."""
        with self._not_training():
            return super().evaluate(*arguments, **named)

    def held_out_scores(self) -> dict[str, float]:
        """The held-out scores of this step: those of the log where it has them, else they are measured."""
        for line in reversed(self.state.log_history):
            if line["step"] == self.state.global_step and "eval_loss" in line:
                return {name: value for name, value in line.items() if name != "step"}
        return self.evaluate()

    def _inner_training_loop(self, *arguments: Any, **named: Any) -> Any:
        try:
            with self.stop:
                return super()._inner_training_loop(*arguments, **named)
        finally:
            self.progress.close()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write it aside, and give it its name once it is whole; all ranks must call."""
        checkpoints = Path(str(self.args.output_dir))
        with self._not_training(), keeps_the_one_before(checkpoints, self.state.global_step):
            if self.args.should_save:
                shutil.rmtree(checkpoints / PARTIAL, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._writing = checkpoints / PARTIAL
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = None
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(checkpoints / PARTIAL, kept=self.args.save_total_limit)
            self.accelerator.wait_for_everyone()

    def starts_at(self, checkpoint: Path) -> None:
        """Called before the run goes on from `checkpoint`."""

    def run(self, folder: Path) -> dict[str, float]:
        """Train, going on from the newest whole checkpoint in `folder`, and return the held-out scores.

        Raises:
            TrainingError: a loss that is not finite, no room on the disk, or no whole checkpoint among those there are.
            KeyboardInterrupt: a stop was requested; the checkpoint is saved.
        """
        newest, faults = newest_whole(folder / "checkpoints")
        if faults and self.is_world_process_zero():
            self.progress.say(f"going on from {newest}; passed over {'; '.join(faults)}")
        if newest:
            self.starts_at(newest)
        with plain_words_when_full(folder):
            self.train(resume_from_checkpoint=None if newest is None else str(newest))
            if self.stop.made:
                if self.is_world_process_zero():
                    self.progress.say(f"saved the checkpoint of step {self.state.global_step}")
                raise KeyboardInterrupt
            return self.held_out_scores()
