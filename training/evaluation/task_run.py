"""Put a task's questions to a model, going on from what is kept, and refuse scores of less than all answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.progress import Progress

from training.evaluation.endpoint import EndpointError
from training.evaluation.predictions import NAMED, Prediction, Stored, open_predictions
from training.evaluation.resampling import Measure
from training.evaluation.task_items import Item, TaskItems
from training.evaluation.task_scores import notes_of, score_task


class Predictor(Protocol):
    """What is measured: `in_process.InProcess`, `endpoint.Endpoint`, or anything else that answers items."""

    def predict(self, asked: TaskItems, items: Sequence[Item], keep: Callable[[Prediction], None]) -> None:
        """Answer `items`, each prediction handed to `keep` as soon as it is there."""


class IncompleteError(ValueError):
    """Questions without an answer; the message names them and the way out."""


@dataclass(frozen=True)
class TaskFindings:
    """A task, what was answered, and the scores; `items` are those that are answered."""

    asked: TaskItems
    items: tuple[Item, ...]
    predictions: Mapping[str, Prediction]
    unanswered: Mapping[str, str]  # why, by id
    measures: tuple[Measure, ...]
    notes: tuple[str, ...]
    of_now: int = 0  # answers of this run; the others had been kept
    seconds: float = 0.0


def header_of(asked: TaskItems, model: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for a run to go on from kept predictions; `model` says whose they are."""
    return {"task": asked.name, "asked": asked.sha256, "max_tokens": asked.task.max_tokens, "model": dict(model)}


def answer_task(asked: TaskItems, predictor: Predictor, file: Path, model: Mapping[str, Any]) -> tuple[Stored, int]:
    """Answers to all of a task's questions, and how many are new: those in `file` are kept, and new ones added there.

    An answer that failed before is asked again. Raises what the predictor raises; what is answered by then is kept.
    """
    with open_predictions(file, header_of(asked, model), [item.id for item in asked.items]) as writer:
        missing = [item for item in asked.items if item.id not in writer.answered]
        with Progress() as progress:
            bar = progress.add_task(asked.name, total=len(asked.items), completed=len(asked.items) - len(missing))

            def keep(prediction: Prediction) -> None:
                writer.add(prediction)
                progress.advance(bar)

            if missing:
                try:
                    predictor.predict(asked, missing, keep)
                except EndpointError as error:
                    kept = f"{len(writer.answered)} of {len(asked.items)} answers are kept in {file}"
                    raise EndpointError(f"{error}. {kept}: the same command goes on from there") from error
        return Stored(None, writer.answered, writer.failed), len(writer.answered) + len(missing) - len(asked.items)


def require_complete(asked: TaskItems, stored: Stored, partial: bool) -> dict[str, str]:
    """Why questions are not answered, by id. Raises IncompleteError where there are such, unless `partial`."""
    unanswered = {
        item.id: stored.failed.get(item.id, "not asked") for item in asked.items if item.id not in stored.answered
    }
    if unanswered and not partial:
        named = "; ".join(f"{id}: {why}" for id, why in list(unanswered.items())[:NAMED])
        named += "; ..." if len(unanswered) > NAMED else ""
        raise IncompleteError(
            f"task {asked.name}: {len(unanswered)} of {len(asked.items)} questions are not answered ({named}). The "
            "same command asks them again; --partial scores the rest"
        )
    return unanswered


def findings_of(asked: TaskItems, stored: Stored, partial: bool) -> TaskFindings:
    """The scores of a task. Raises IncompleteError where a question is not answered, unless `partial`."""
    unanswered = require_complete(asked, stored, partial)
    items = tuple(item for item in asked.items if item.id in stored.answered)
    notes = notes_of(asked.task)
    if unanswered:
        notes.append(f"{len(unanswered)} of {len(asked.items)} questions are not answered, and in no score here")
    if asked.left_out:
        notes.append(f"{asked.left_out:,} questions of the data are not of the kind {asked.task.kind}, and not asked")
    measures = tuple(score_task(asked.task, items, stored.answered))
    return TaskFindings(asked, items, stored.answered, unanswered, measures, tuple(notes))


def measures_of_both(asked: TaskItems, first: Stored, second: Stored) -> list[tuple[Measure, Measure]]:
    """The scores of two models on the questions that both answered, side by side."""
    items = [item for item in asked.items if item.id in first.answered and item.id in second.answered]
    pairs = (score_task(asked.task, items, stored.answered) for stored in (first, second))
    return list(zip(*pairs, strict=True))
