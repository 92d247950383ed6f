"""Read the rows of a person's own task file: image, question, answers and choices, or a text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.caption_files import CaptionedPictures
from training.data.pictures import DataError
from training.data.records import open_records
from training.evaluation.task import TaskKind
from training.evaluation.verdicts import VERDICTS, verdict_of

SEPARATOR = "|"  # between several texts in one cell of a CSV
NAMED = 3  # how many missing pictures an error names


@dataclass(frozen=True)
class TaskRow:
    """One row: a question about a picture, or a text alone (then there is no picture)."""

    id: str
    image: Path | None
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    kind: str | None
    group: str | None
    text: str


def read_captioned(file: Path) -> CaptionedPictures:
    """The pictures of `file` with their captions. Raises DataError naming the first that has none."""
    captioned = CaptionedPictures(file)
    for number in range(len(captioned.files)):
        if not captioned.catalogue.texts(number, "captions"):
            raise DataError(f"{file}: {captioned.files[number]} has no caption to be compared with")
    return captioned


def read_task_rows(file: Path, kind: TaskKind, question: str | None) -> list[TaskRow]:
    """The rows of `file` (.jsonl, .json or .csv), for tasks of `kind`; `question` is asked where a row has none.

    Fields: `image` (a path that counts from the file's folder), `question`, `answer` or `answers`, `choices`, and
    where wanted `id`, `kind` (of question) and `group`; or `text`. A CSV separates several texts by |. Other fields
    are left alone.

    Raises DataError naming file, row and field, or the pictures that are missing.
    """
    records = open_records(file)
    rows = []
    for number in range(len(records)):
        try:
            rows.append(_row(records[number], file, kind, question, str(number + 1)))
        except DataError as error:
            raise DataError(f"{file}, {records.place(number)}: {error}") from error
    missing = sorted({row.image for row in rows if row.image is not None and not row.image.is_file()})
    if missing:
        listed = ", ".join(map(str, missing[:NAMED])) + (" ..." if len(missing) > NAMED else "")
        raise DataError(f"{file} names {len(missing)} pictures that are not there: {listed}")
    return rows


def _row(record: dict[str, Any], file: Path, kind: TaskKind, question: str | None, number: str) -> TaskRow:
    text_of: Callable[[str], str | None] = lambda field: _text(record, field)  # noqa: E731 - a short name for a call
    id, group, question_kind = text_of("id") or number, text_of("group"), text_of("kind")
    if kind == "perplexity":
        text = _needed(text_of("text"), "text")
        return TaskRow(id, None, "", (), (), question_kind, group, text)
    image = file.parent / _needed(text_of("image"), "image")
    asked = _needed(question or text_of("question"), "question")
    answers = _texts(record, "answers") or _texts(record, "answer")
    if not answers:
        raise DataError("answer: it is missing; write answer, or answers where several are right")
    choices = _texts(record, "choices") if kind == "choices" else ()
    return TaskRow(id, image, asked, _checked(answers, choices, kind), choices, question_kind, group, "")


def _checked(answers: tuple[str, ...], choices: tuple[str, ...], kind: TaskKind) -> tuple[str, ...]:
    """The answers as a task of `kind` expects them."""
    if kind in ("words", "vqa"):
        return answers
    if len(answers) > 1:
        raise DataError(f"answers: a task of the kind {kind} has one right answer, and here are {len(answers)}")
    if kind == "choices":
        if len(choices) < 2 or len(set(choices)) < len(choices):
            raise DataError("choices: two or more, each another one, are needed")
        if answers[0] not in choices:
            raise DataError(f"answer: {answers[0]!r} is none of the choices {', '.join(map(repr, choices))}")
        return answers
    verdict = verdict_of(answers[0], kind)
    if verdict is None:
        raise DataError(f"answer: {answers[0]!r} is none of {', '.join(VERDICTS[kind])}")
    return (verdict,)


def _needed(text: str | None, field: str) -> str:
    if text is None:
        raise DataError(f"{field}: it is missing")
    return text


def _text(record: dict[str, Any], field: str) -> str | None:
    found = record.get(field)
    if found is None or (isinstance(found, str) and not found.strip()):
        return None
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise DataError(f"{field}: {found!r:.60} is no text")
    return str(found).strip()


def _texts(record: dict[str, Any], field: str) -> tuple[str, ...]:
    found = record.get(field)
    if isinstance(found, list):
        texts = [_text({field: one}, field) for one in found]
    else:
        whole = _text(record, field)
        texts = [part.strip() or None for part in whole.split(SEPARATOR)] if whole is not None else []
    if None in texts:
        raise DataError(f"{field}: one of its texts is empty")
    return tuple(text for text in texts if text is not None)
