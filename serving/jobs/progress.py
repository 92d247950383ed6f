"""Follow the log of a run that trains: each of its steps becomes an event of the job, and all of them a table."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.jobs.records import JobRecord, JobRecords


class StepTeller:
    """Tells the owner of a job what its run noted since the last call, and when it will be over."""

    def __init__(self, records: JobRecords, record: JobRecord, log: Path) -> None:
        self._records, self._record, self._log = records, record, log
        self._told = record.told
        self._first: tuple[float, float] | None = None  # the first step that was noted since this start, and when

    def __call__(self) -> None:
        """Read on, and tell."""
        validates = self._record.job.validation_file is not None
        notes, told = step_notes(self._log, self._told, self._record.steps, validates)
        if told == self._told:
            return
        self._told = told
        finish = self._estimated_finish([note.numbers["step"] for note in notes if note.numbers is not None])

        def progressed(changed: JobRecord) -> None:
            changed.told, changed.job.estimated_finish = told, finish

        if self._records.change(self._record.job.id, progressed) is not None:
            for note in notes:
                self._records.tell(
                    self._record.job.id, note.message, "warn" if note.numbers is None else "info", note.numbers
                )

    def _estimated_finish(self, steps: list[float]) -> int | None:
        if not steps:
            return None
        if self._first is None:
            self._first = steps[-1], time.monotonic()
            return None
        step, since = self._first
        left = self._record.steps - steps[-1]
        return int(time.time() + left * (time.monotonic() - since) / max(1.0, steps[-1] - step))


@dataclass(frozen=True)
class StepNote:
    """One line of a run's log, as its owner may see it."""

    message: str
    numbers: dict[str, float] | None  # None for what is said in words


def step_notes(file: Path, told: int, steps: int, validates: bool) -> tuple[list[StepNote], int]:
    """What the log says behind its first `told` bytes, and how many bytes of it are told then. Whole lines only."""
    if not file.is_file():
        return [], told
    with file.open("rb") as log:
        log.seek(told)
        content = log.read()
    whole = content[: content.rfind(b"\n") + 1]
    notes = [note for line in whole.splitlines() if (note := _note_of(json.loads(line), steps, validates)) is not None]
    return notes, told + len(whole)


def _note_of(line: dict[str, Any], steps: int, validates: bool) -> StepNote | None:
    if "words" in line:
        return StepNote(f"Step {line['step']}/{steps}: {line['words']}", None)
    numbers = {"step": float(line["step"]), "total_steps": float(steps)}
    if "loss" in line:
        numbers["train_loss"] = float(line["loss"])
        return StepNote(f"Step {line['step']}/{steps}: training loss={line['loss']:.4f}", numbers)
    if "eval_loss" in line and validates:
        numbers["full_valid_loss"] = float(line["eval_loss"])
        return StepNote(f"Step {line['step']}/{steps}: validation loss={line['eval_loss']:.4f}", numbers)
    return None


def metrics_csv(metrics: list[dict[str, float]]) -> str:
    """A table of the run: step, training and validation loss, empty where a step has none."""
    steps: dict[int, dict[str, float]] = {}
    for numbers in metrics:  # a step that was run again after a stop has its newest numbers
        steps.setdefault(int(numbers["step"]), {}).update(numbers)
    lines = ["step,train_loss,full_valid_loss"]
    for step, numbers in sorted(steps.items()):
        lines.append(f"{step},{numbers.get('train_loss', '')},{numbers.get('full_valid_loss', '')}")
    return "\n".join(lines) + "\n"
