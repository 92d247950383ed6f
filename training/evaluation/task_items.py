"""The single questions of a task, from shards, a file of one's own, generated scenes, or texts."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from assistant.questions import CAPTION_QUESTION
from training.data.pictures import DataError, PictureRow, QuestionAnswer, read_rows
from training.data.scenes import EVALUATION_SEED, kind_of, make_scene
from training.data.texts import read_texts
from training.evaluation.task import QUESTION_PLACE, Task, read_task, task_file
from training.evaluation.task_pictures import TaskPictures
from training.evaluation.task_rows import TaskRow, read_captioned, read_task_rows
from training.evaluation.verdicts import VERDICTS

LONGEST_TEXT = 1000  # characters; longer texts are cut off, so that small models can read them whole


@dataclass(frozen=True)
class Item:
    """One question. `expected` are references, people's answers, or the one right answer; of a text, the text."""

    id: str
    question: str  # as it is sent; empty for a text
    picture: int | None  # its place among the task's pictures
    expected: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str | None = None  # of question: scores are told for each kind too
    group: str = ""  # what is drawn as one when chance is estimated: a picture, or a statement about several


@dataclass(frozen=True)
class TaskItems:
    """A task with its questions and pictures. `sha256` is of all that is asked and expected, pictures included."""

    name: str
    task: Task
    items: tuple[Item, ...]
    pictures: TaskPictures
    left_out: int  # questions of the data that are not of the task's kind
    sha256: str


def open_task(name: str, data_folder: Path | None, limit: int | None = None) -> TaskItems:
    """The task called `name` (shipped, or a .yaml file) with everything that it asks.

    Args:
        data_folder: where shards lie.
        limit: at most so many pictures of each shard, rows of a file, scenes or texts, whatever the task says.

    Raises:
        TaskError: there is no such task, or a field of it does not fit.
        DataError: data that are missing or damaged, or hold no question of the task's kind.
    """
    file = task_file(name)
    task = read_task(file)
    if limit is not None:
        least = min(limit, task.data.limit or limit)
        task = task.model_copy(update={"data": task.data.model_copy(update={"limit": least})})
    pictures = TaskPictures()
    found = list(_items(task, file, data_folder, pictures))
    items = tuple(item for item in found if item is not None)
    if not items:
        raise DataError(f"task {file.stem}: its data hold no question of the kind {task.kind}")
    twice = [id for id, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"task {file.stem}: {twice[0]} stands twice in its data; names of questions have to differ")
    return TaskItems(file.stem, task, items, pictures, len(found) - len(items), _sha256(items, pictures))


def _items(task: Task, file: Path, folder: Path | None, pictures: TaskPictures) -> Iterator[Item | None]:
    """Every question; None for one that is not of the task's kind."""
    data = task.data
    if data.scenes:
        yield from _of_scenes(task, pictures)
    elif data.file:
        yield from _of_file(task, file.parent / Path(data.file).expanduser(), pictures)
    elif folder is None:
        raise DataError(f"task {file.stem} reads shards: name their folder with --data or KANGAROO_DATA")
    elif data.texts:
        rows = [row for row in read_texts(folder, data.texts) if data.text_source in (None, row.source)]
        plain = [row.text for row in rows if not row.prompt][: data.limit]
        yield from (text_item(f"{data.text_source or data.texts}/{n}", text) for n, text in enumerate(plain))
    else:
        for shard in data.shards:
            for row in read_rows(folder, shard)[: data.limit]:
                yield from _of_picture(task, row, pictures)


def text_item(id: str, text: str) -> Item:
    """A text whose likelihood is asked for, its first `LONGEST_TEXT` characters."""
    return Item(id, "", None, (text[:LONGEST_TEXT],), group=id)


def _of_picture(task: Task, row: PictureRow, pictures: TaskPictures) -> Iterator[Item | None]:
    place: Callable[[], int] = _once(lambda: pictures.add(f"row {row.id} of {row.shard}", row.encoded))
    if task.kind == "captions":
        yield caption_item(task, row.id, place(), row.captions) if row.captions else None
        return
    for number, question in enumerate(row.questions):
        yield question_item(task, f"{row.id}#{number}", place, question, None, row.id)


def _of_scenes(task: Task, pictures: TaskPictures) -> Iterator[Item | None]:
    data = task.data
    for number in range(min(data.scenes or 0, data.limit or data.scenes or 0)):
        scene = make_scene(EVALUATION_SEED + number, kind=kind_of(number, data.kinds))
        name = f"scene/{scene.seed}"
        place = _once(lambda scene=scene, name=name: pictures.add(name, scene.image))  # type: ignore[misc]
        if task.kind == "captions":
            yield caption_item(task, name, place(), scene.captions)
            continue
        for index, asked in enumerate(scene.questions):
            question = QuestionAnswer(asked.question, asked.answer, tuple(asked.choices))
            yield question_item(task, f"{name}#{index}", place, question, asked.kind, name)


def _of_file(task: Task, file: Path, pictures: TaskPictures) -> Iterator[Item]:
    limit = task.data.limit
    if task.kind == "captions":
        captioned = read_captioned(file)
        for number, path in enumerate(captioned.files[:limit]):
            name = path.relative_to(file.parent).as_posix() if path.is_relative_to(file.parent) else str(path)
            yield caption_item(task, name, pictures.add(str(path), path), captioned.catalogue.texts(number, "captions"))
        return
    places: dict[Path, int] = {}
    for row in read_task_rows(file, task.kind, task.question)[:limit]:
        if row.image is None:
            yield text_item(row.id, row.text)
            continue
        if row.image not in places:
            places[row.image] = pictures.add(str(row.image), row.image)
        yield _of_row(task, row, places[row.image])


def _of_row(task: Task, row: TaskRow, place: int) -> Item:
    asked = task.prompt.replace(QUESTION_PLACE, task.question or row.question)
    group = row.group or (asked if task.kind == "true_false" else str(row.image))
    return Item(row.id, asked, place, row.answers, row.choices, row.kind, group)


def caption_item(task: Task, id: str, picture: int, references: tuple[str, ...]) -> Item:
    """A picture to be described, with what people said of it."""
    asked = task.prompt.replace(QUESTION_PLACE, task.question or CAPTION_QUESTION)
    return Item(id, asked, picture, references, group=id)


def question_item(
    task: Task, id: str, place: Callable[[], int], question: QuestionAnswer, kind: str | None, group: str
) -> Item | None:
    """A question of a shard or a scene, or None where it is not of the task's kind; `place` gives its picture's."""
    expected = question.answer
    if task.kind in VERDICTS:
        expected = expected.strip(" .").lower()
        if expected not in VERDICTS[task.kind].values():
            return None
    if task.kind == "choices" and (len(question.choices) < 2 or expected not in question.choices):
        return None
    asked = task.prompt.replace(QUESTION_PLACE, task.question or question.question)
    choices = question.choices if task.kind == "choices" else ()
    group = asked if task.kind == "true_false" else group
    return Item(id, asked, place(), (expected,), choices, kind, group)


def _once(add: Callable[[], int]) -> Callable[[], int]:
    """`add`, called the first time only: a picture of which nothing is asked is not taken in."""
    places: list[int] = []

    def place() -> int:
        if not places:
            places.append(add())
        return places[0]

    return place


def _sha256(items: tuple[Item, ...], pictures: TaskPictures) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(asdict(item), sort_keys=True).encode())
    for place in range(len(pictures)):
        digest.update(pictures.sha256(place).encode())
    return digest.hexdigest()
