"""What a task file may say, and what becomes of it: shards, files of one's own, generated scenes, texts."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from assistant.questions import CAPTION_QUESTION
from tests.shards import picture_record, text_record
from training.data.pictures import DataError
from training.data.scenes import EVALUATION_SEED, make_scene
from training.evaluation.predictions import Prediction, PredictionError, open_predictions, read_predictions
from training.evaluation.task import Task, TaskError, read_task, shipped_tasks, task_file
from training.evaluation.task_items import open_task
from training.evaluation.task_pictures import TaskPictures

SHIPPED = [
    "coco-yes-no",
    "daquar-words",
    "flickr8k-captions",
    "nlvr-true-false",
    "scenes",
    "text-perplexity",
    "visual7w-choices",
]


def write(folder: Path, text: str, name: str = "own.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of shards, with people's answers that are not of every kind."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [picture_record(seed) for seed in range(8)]
    rows[0]["captions"] = []
    statement = {"question": "There is a box.", "choices": ["true", "false"]}
    for number, row in enumerate(rows):
        row["qa"].append(statement | {"answer": ("true", "false")[number % 2]})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "some-00.parquet")
    texts = [text_record(seed, source) for source in ("a", "b") for seed in range(6)]
    parquet.write_table(pyarrow.Table.from_pylist(texts), folder / "texts.parquet")
    return folder


def test_the_shipped_tasks_are_valid_and_go_into_the_wheel() -> None:
    assert shipped_tasks() == SHIPPED
    kinds = {read_task(task_file(name)).kind for name in shipped_tasks()}
    assert kinds == {"captions", "words", "choices", "yes_no", "true_false", "perplexity"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: words\ndata: {scenes: 5}", "about: Field required"),
        ("about: x\nkind: word\ndata: {scenes: 5}", "kind: Input should be 'captions'"),
        ("about: x\nkind: words\ndata: {scenes: 5, shard: a}", "data.shard: Extra inputs"),
        ("about: x\nkind: words\ndata: {}", "data: Value error, name one of shards, file, scenes, texts, not none"),
        ("about: x\nkind: words\ndata: {scenes: 5, file: a.csv}", "not file and scenes"),
        ("about: x\nkind: words\ndata: {shards: [a], kinds: [chart]}", "kinds are said of scenes only"),
        ("about: x\nkind: words\ndata: {texts: a}", "texts are for the kind perplexity"),
        ("about: x\nkind: perplexity\ndata: {scenes: 5}", "perplexity is of texts"),
        ("about: x\nkind: words\ndata: {scenes: 5}\nprompt: Answer!", "prompt: {question} does not stand in it"),
        ("about: x\nkind: words\ndata: {scenes: 0}\nmax_tokens: 0", "max_tokens: Input should be greater"),
        ("[1]", "the task: Input should be a valid dictionary"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(TaskError) as error:
        read_task(file)
    assert str(error.value).startswith(str(file)) and said in str(error.value)


def test_a_task_that_is_not_there_is_said_with_those_that_are() -> None:
    with pytest.raises(TaskError, match=r"no task flickr.*coco-yes-no.*or name a \.yaml"):
        task_file("flickr")


def test_scenes_are_those_that_nobody_trains_on(tmp_path: Path) -> None:
    asked = open_task("scenes", None, limit=6)
    scenes = [make_scene(EVALUATION_SEED + number) for number in range(6)]
    told = [(item.question, item.expected, item.kind, item.group) for item in asked.items]
    assert told == [(q.question, (q.answer,), q.kind, f"scene/{s.seed}") for s in scenes for q in s.questions]
    assert [asked.pictures[n].tobytes() for n in range(6)] == [scene.image.tobytes() for scene in scenes]
    assert asked.sha256 == open_task("scenes", None, limit=6).sha256 != open_task("scenes", None, limit=5).sha256
    charts = open_task(str(write(tmp_path, "about: x\nkind: words\ndata: {scenes: 3, kinds: [chart]}")), None)
    assert {item.kind for item in charts.items} <= {"chart", "yes_no", "colour", "count", "size", "position"}


def test_shards_give_what_is_of_the_kind_and_count_the_rest(data: Path, tmp_path: Path) -> None:
    def opened(kind: str, more: str = "") -> list:
        file = write(tmp_path, f"about: x\nkind: {kind}\ndata: {{shards: [some]}}\n{more}")
        return [asked := open_task(str(file), data), asked.items]

    rows = [picture_record(seed) for seed in range(8)]
    captions, items = opened("captions")
    assert (len(items), captions.left_out, len(captions.pictures)) == (7, 1, 7)
    assert items[0].expected == tuple(rows[1]["captions"]) and items[0].question == CAPTION_QUESTION
    _, items = opened("words", "prompt: 'Briefly: {question}'")
    assert len(items) == sum(len(row["qa"]) + 1 for row in rows) and items[0].question.startswith("Briefly: ")
    asked, items = opened("yes_no")
    answers = [q["answer"] for row in rows for q in row["qa"]]
    assert len(items) == sum(answer in ("yes", "no") for answer in answers)
    assert asked.left_out == len(answers) + 8 - len(items)
    _, items = opened("true_false")
    assert [item.group for item in items if item.question == "There is a box."] == ["There is a box."] * 8
    _, items = opened("choices")
    assert all(item.expected[0] in item.choices and len(item.choices) > 1 for item in items)
    with pytest.raises(DataError, match="--data or KANGAROO_DATA"):
        open_task(str(tmp_path / "own.yaml"), None)
    with pytest.raises(DataError, match="coco-validation"):
        open_task("coco-yes-no", data)


def test_texts_are_the_plain_ones_of_a_source(data: Path, tmp_path: Path) -> None:
    file = write(tmp_path, "about: x\nkind: perplexity\ndata: {texts: texts, text_source: b, limit: 2}")
    asked = open_task(str(file), data)
    assert [item.id for item in asked.items] == ["b/0", "b/1"]
    assert asked.items[1].expected == (make_scene(2).captions[0],)
    assert len(asked.pictures) == 0


def own_rows(folder: Path, kind: str, rows: str, suffix: str = "jsonl") -> Path:
    Image.new("RGB", (30, 20), "red").save(folder / "a.png")
    (folder / f"rows.{suffix}").write_text(rows)
    return write(folder, f"about: mine\nkind: {kind}\ndata: {{file: rows.{suffix}}}\n")


def test_a_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    table = "image,question,answers,choices,kind,group,remark\na.png,Which?,x|y,,colour,g,left alone\n"
    lines = {"image": "a.png", "question": "Which?", "answers": ["x", "y"], "kind": "colour", "group": "g"}
    one = open_task(str(own_rows(tmp_path, "words", table, "csv")), None)
    other = open_task(str(own_rows(tmp_path, "words", json.dumps(lines))), None)
    assert one.items == other.items and one.sha256 == other.sha256
    (item,) = one.items
    assert (item.id, item.question, item.expected, item.kind, item.group) == ("1", "Which?", ("x", "y"), "colour", "g")


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("words", {"question": "q", "answer": "a"}, "image: it is missing"),
        ("words", {"image": "a.png", "answer": "a"}, "question: it is missing"),
        ("words", {"image": "a.png", "question": "q"}, "answer: it is missing"),
        ("words", {"image": "a.png", "question": ["q"], "answer": "a"}, r"question: \['q'\] is no text"),
        ("vqa", {"image": "a.png", "question": "q", "answers": ["a", ""]}, "answers: one of its texts is empty"),
        ("choices", {"image": "a.png", "question": "q", "answer": "a", "choices": ["a"]}, "choices: two or more"),
        ("choices", {"image": "a.png", "question": "q", "answer": "c", "choices": ["a", "b"]}, "'c' is none of"),
        ("yes_no", {"image": "a.png", "question": "q", "answer": "maybe"}, "answer: 'maybe' is none of yes, no"),
        ("yes_no", {"image": "a.png", "question": "q", "answers": ["yes", "no"]}, "has one right answer"),
        ("perplexity", {"image": "a.png"}, "text: it is missing"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, kind: str, row: dict, said: str) -> None:
    good = {"image": "a.png", "question": "q", "answer": "yes", "choices": ["yes", "no"], "text": "t"}
    rows = f"{json.dumps(good)}\n{json.dumps(row)}\n"
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 2 \(line 2\): .*{said}"):
        open_task(str(own_rows(tmp_path, kind, rows)), None)


def test_missing_pictures_and_double_names_are_said_before_anything_is_asked(tmp_path: Path) -> None:
    rows = [{"image": f"{name}.png", "question": "q", "answer": "a"} for name in ("a", "gone", "lost")]
    file = own_rows(tmp_path, "words", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"names 2 pictures that are not there: .*gone\.png, .*lost\.png"):
        open_task(str(file), None)
    twice = json.dumps(rows[0] | {"id": "same"}) + "\n"
    with pytest.raises(DataError, match="same stands twice"):
        open_task(str(own_rows(tmp_path, "words", 2 * twice)), None)
    with pytest.raises(DataError, match="no file"):
        open_task(str(write(tmp_path, "about: x\nkind: words\ndata: {file: none.csv}")), None)


def test_captions_of_ones_own_are_put_together(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "one"}, {"image": "a.png", "captions": ["two", "three"]}]
    asked = open_task(str(own_rows(tmp_path, "captions", "".join(json.dumps(row) + "\n" for row in rows))), None)
    (item,) = asked.items
    assert (item.id, item.expected) == ("a.png", ("one", "two", "three"))


def test_a_picture_is_decoded_once_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    for memory in (2**20, 0):  # where there is no room, questions that follow each other still share it
        pictures = TaskPictures(memory)
        places = [pictures.add("a", tmp_path / "a.png"), pictures.add("bad", tmp_path / "bad.png")]
        assert [pictures[places[0]].size for _ in range(3)] == [(30, 20)] * 3
        assert pictures.decoded == 1
        with pytest.raises(DataError, match="bad: "):
            pictures[places[1]]


def test_kept_predictions_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    with open_predictions(file, {"model": "m"}, ["a", "b"]) as writer:
        writer.add(Prediction(id="a", failed="no"))
        writer.add(Prediction(id="a", answer="yes"))
        with (
            pytest.raises(PredictionError, match="being written by another run"),
            open_predictions(file, {"model": "m"}, ["a", "b"]),
        ):
            pass
    stored = read_predictions(file, ["a", "b"])
    assert (stored.header, stored.failed, stored.answered["a"].answer) == ({"model": "m"}, {}, "yes")
    with pytest.raises(PredictionError, match="answers 1 questions that this task does not ask: a"):
        read_predictions(file, ["b"])
    for line, said in (
        ('{"id": "a", "answer": "no"}', "line 4: a is answered twice"),
        ('{"id": "b", "answr": "no"}', "line 4: answr: Extra inputs"),
        ('{"id": "b", "answer": 3}', "line 4: answer: Input should be a valid string"),
        ("{", "line 4: the line: Invalid JSON"),
    ):
        copy = tmp_path / "copy.jsonl"
        copy.write_text(file.read_text() + line + "\n")
        with pytest.raises(PredictionError, match=said):
            read_predictions(copy, ["a", "b"])
    with pytest.raises(PredictionError, match="no file of predictions"):
        read_predictions(tmp_path / "none.jsonl", [])


def test_a_task_says_whether_it_generates() -> None:
    task = Task.model_validate({"about": "", "kind": "choices", "data": {"scenes": 1}})
    assert task.by_likelihood
