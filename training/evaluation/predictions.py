"""What a model said to each question of a task: an append-only file that a run goes on from, and its checks."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, ValidationError

from training.strict import faults_in

NAMED = 3  # how many names an error lists


class PredictionError(ValueError):
    """Predictions that cannot be used; the message names the file and the way out."""


class Prediction(BaseModel):
    """One line: an answer, or log-likelihoods (nats) with the tokens of each text, or why there is neither."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    answer: str | None = None
    likelihoods: tuple[float, ...] | None = None
    tokens: tuple[int, ...] | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Stored:
    """What a file holds: its first line, where it has one, the predictions by id, and the failures that stand."""

    header: Mapping[str, Any] | None
    answered: dict[str, Prediction]
    failed: dict[str, str]


class PredictionWriter:
    """Appends predictions, each on the disk before the next is asked."""

    def __init__(self, lines: TextIO, stored: Stored) -> None:
        self._lines = lines
        self.answered, self.failed = dict(stored.answered), dict(stored.failed)

    def add(self, prediction: Prediction) -> None:
        """Keep `prediction`; an answer takes the place of an earlier failure."""
        if prediction.failed is None:
            self.answered[prediction.id] = prediction
            self.failed.pop(prediction.id, None)
        else:
            self.failed[prediction.id] = prediction.failed
        self._lines.write(prediction.model_dump_json(exclude_none=True) + "\n")
        self._lines.flush()


@contextmanager
def open_predictions(file: Path, header: Mapping[str, Any], ids: Sequence[str]) -> Iterator[PredictionWriter]:
    """The predictions in `file`, to go on from, or a new file that begins with `header`.

    Raises PredictionError where the file is of another task, model or settings, is damaged, or is being written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", encoding="utf-8") as lines:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PredictionError(
                f"{file} is being written by another run; wait for it, or name another --out"
            ) from error
        _cut_torn_line(file)
        if file.stat().st_size == 0:
            lines.write(json.dumps({"header": header}) + "\n")
            lines.flush()
        stored = _parsed(file)
        if stored.header != json.loads(json.dumps(header)):
            differs = _difference(stored.header or {}, header)
            raise PredictionError(
                f"{file} holds predictions of another run ({differs}); take it away, or name another --out"
            )
        _require_known(file, stored, ids)
        yield PredictionWriter(lines, stored)


def _cut_torn_line(file: Path) -> None:
    """Takes away a last line that was not finished when its run was killed."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def _difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    return ", ".join(f"{name}: {stored.get(name)!s:.60} there, {now.get(name)!s:.60} now" for name in names)


def read_predictions(file: Path, ids: Sequence[str]) -> Stored:
    """The predictions in `file` (JSON lines; a first line with a `header` may be missing).

    Raises PredictionError naming the line that cannot be read, ids that the task does not have, or one that is
    answered twice.
    """
    if not file.is_file():
        raise PredictionError(f"there is no file of predictions {file}")
    stored = _parsed(file)
    _require_known(file, stored, ids)
    return stored


def _parsed(file: Path) -> Stored:
    header, answered, failed = None, dict[str, Prediction](), dict[str, str]()
    for number, line in _numbered(file):
        if number == 1 and '"header"' in line:
            header = _json(line, file, number).get("header")
            continue
        try:
            prediction = Prediction.model_validate_json(line)
        except ValidationError as error:
            raise PredictionError(f"{file}, line {number}: {faults_in(error, 'the line')}") from error
        if prediction.failed is not None:
            failed[prediction.id] = prediction.failed
        elif prediction.id in answered:
            raise PredictionError(
                f"{file}, line {number}: {prediction.id} is answered twice; take one of the lines out"
            )
        else:
            answered[prediction.id] = prediction
    return Stored(header, answered, {id: why for id, why in failed.items() if id not in answered})


def _require_known(file: Path, stored: Stored, ids: Sequence[str]) -> None:
    known = set(ids)
    strange = [id for id in (*stored.answered, *stored.failed) if id not in known]
    if strange:
        listed = ", ".join(strange[:NAMED]) + (" ..." if len(strange) > NAMED else "")
        raise PredictionError(f"{file} answers {len(strange)} questions that this task does not ask: {listed}")


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise PredictionError(f"{file} is not UTF-8: {error}") from error


def _json(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise PredictionError(f"{file}, line {number} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
