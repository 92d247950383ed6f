"""Scores: worked out by hand where that is possible, by their properties elsewhere, and on a real model end to end."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from tiny import make_tiny_llava

from assistant.answering import Assistant, Request
from assistant.questions import CAPTION_QUESTION
from training.data.pictures import DataError, read_rows
from training.data.scenes import EVALUATION_SEED, Scene, make_scene
from training.evaluation.answers import accuracy, accuracy_by_kind, normalised
from training.evaluation.captions import moved, score_captions, tokenised
from training.evaluation.scorecard import answer_all, measure, measure_captions, measure_scenes, measure_yes_no

SENTENCES = [
    "a dog runs over the wet green grass",
    "two children play football on a sandy beach",
    "an old man reads the paper in his kitchen",
    "three climbers rest below a snowy mountain peak",
]


class Answerer:
    """Answers by a rule that the test knows, in place of a model; it records the size of each batch."""

    def __init__(self, rule: Callable[[Request], str]) -> None:
        self.rule = rule
        self.batches: list[int] = []

    def answer_batch(self, requests: Sequence[Request], max_new_tokens: int = 64) -> list[str]:
        self.batches.append(len(requests))
        return [self.rule(request) for request in requests]


def test_bleu_of_one_picture_by_hand() -> None:
    # Of 7, 6, 5 and 4 n-grams, 6, 5, 4 and 3 are found, so the product is 3/7; the lengths are equal.
    scores = score_captions(["The cat sat on the mat today."], [["the cat sat on the mat yesterday"]])
    assert scores.bleu_4 == pytest.approx(100 * (3 / 7) ** 0.25, rel=1e-6)


def test_bleu_pools_the_counts_of_the_corpus_and_punishes_brevity() -> None:
    captions = ["the cat sat on the mat today", "one two three four five"]
    references = [["the cat sat on the mat yesterday"], ["one two three four five six seven"]]
    precisions = (11 / 12) * (9 / 10) * (7 / 8) * (5 / 6)
    expected = 100 * math.exp(1 - 14 / 12) * precisions**0.25
    assert score_captions(captions, references).bleu_4 == pytest.approx(expected, rel=1e-6)


def test_cider_of_equal_captions_is_full_and_falls_when_they_are_moved() -> None:
    references = [[sentence] for sentence in SENTENCES]
    # No word is in both pictures, so every weight is log(2), each of the four cosines 1, and 100 times 10 the score.
    assert score_captions(
        ["one two three four", "five six seven eight"], [["one two three four"], ["five six seven eight"]]
    ).cider == pytest.approx(1000)
    same = score_captions(SENTENCES, references)
    other = score_captions([SENTENCES[place] for place in moved(4)], references)
    near = score_captions([sentence.replace("a ", "the ") for sentence in SENTENCES], references)
    assert other.cider < 0.2 * near.cider < near.cider < same.cider
    assert other.bleu_4 < near.bleu_4 < same.bleu_4 == pytest.approx(100)


def test_scores_do_not_depend_on_case_punctuation_or_the_order_of_references() -> None:
    references = [[sentence, SENTENCES[0]] for sentence in SENTENCES]
    shouted = [f"  {sentence.upper()}!!" for sentence in SENTENCES]
    turned = [those[::-1] for those in references]
    assert score_captions(shouted, turned) == score_captions(SENTENCES, references)
    assert tokenised("A man’s T-shirt, un_seen: 3 dogs") == "a man's t shirt un seen 3 dogs"


def test_an_empty_caption_scores_nothing_and_does_no_harm() -> None:
    assert score_captions([""] * 4, [[sentence] for sentence in SENTENCES]).cider == 0


@pytest.mark.parametrize(
    ("captions", "references", "message"),
    [
        ([], [], "0 captions for 0 pictures"),
        (["one"], [["one"], ["two"]], "1 captions for 2 pictures"),
        (["one", "two"], [["one"], [" . "]], "picture 1 has no reference"),
    ],
)
def test_captions_that_cannot_be_scored(captions: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_captions(captions, references)


def test_nothing_stays_where_it_was() -> None:
    for length in (2, 3, 10, 1000):
        for seed in range(20):
            order = moved(length, seed)
            assert sorted(order) == list(range(length))
            assert all(place != number for number, place in enumerate(order))
    assert moved(50, 1) == moved(50, 1) != moved(50, 2)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        moved(1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("Red.", "red"), (" Three ", "3"), ("a circle", "circle"), ("Gray", "grey"), ("top-left", "top left")],
)
def test_answers_alike_but_for_their_writing(given: str, expected: str) -> None:
    assert normalised(given) == normalised(expected)


def test_accuracy_stands_beside_the_commonest_answer() -> None:
    score = accuracy(["yes", "Yes.", "no", "maybe"], ["yes", "no", "no", "no"])
    assert (score.right, score.majority, score.questions) == (0.5, 0.75, 4)
    by_kind = accuracy_by_kind(["count", "colour", "count"], ["1", "red", "2"], ["1", "red", "3"])
    assert {kind: score.right for kind, score in by_kind.items()} == {"colour": 1.0, "count": 0.5}
    with pytest.raises(ValueError, match="0 answers to 0 questions"):
        accuracy([], [])


def test_answers_come_back_in_the_order_of_the_requests() -> None:
    requests = [Request("?" * (number * 7 % 10 + 1) + str(number)) for number in range(10)]
    answerer = Answerer(lambda request: request.question.strip("?"))
    assert answer_all(answerer, requests, "test", 5, batch=4) == [str(number) for number in range(10)]
    assert answerer.batches == [4, 4, 2]


def test_scenes_are_measured_by_kind_on_seeds_kept_for_it() -> None:
    scenes = [make_scene(EVALUATION_SEED + number) for number in range(40)]
    truth = {(q.question, scene.image.tobytes()): q.answer for scene in scenes for q in scene.questions}
    knowing = measure_scenes(Answerer(lambda r: truth[r.question, r.pictures[0].tobytes()]), 40)
    assert all(score["right"] == 1 for score in knowing["by_kind"].values())
    assert set(knowing["by_kind"]) == {q.kind for scene in scenes for q in scene.questions}
    yes = measure_scenes(Answerer(lambda request: "yes"), 40)
    questions = [q for scene in scenes for q in scene.questions if q.kind == "yes_no"]
    assert yes["by_kind"]["yes_no"]["right"] == sum(q.answer == "yes" for q in questions) / len(questions)
    assert yes["by_kind"]["colour"]["right"] == 0


def write_shard(folder: Path, name: str, scenes: Sequence[Scene], cut: int | None = None) -> None:
    """A shard of scenes in the columns of the real ones; `cut` leaves so many bytes of each picture."""
    rows = []
    for scene in scenes:
        sink = io.BytesIO()
        scene.image.save(sink, "PNG")
        qa = [{"question": q.question, "answer": q.answer, "choices": []} for q in scene.questions]
        image = {"bytes": sink.getvalue()[:cut], "path": None}
        rows.append({"id": str(scene.seed), "image": image, "label": None, "captions": list(scene.captions), "qa": qa})
    string = arrow.string()
    questions = arrow.list_(arrow.struct({"question": string, "answer": string, "choices": arrow.list_(string)}))
    picture = arrow.struct({"bytes": arrow.binary(), "path": string})
    schema = arrow.schema(
        {"id": string, "image": picture, "label": string, "captions": arrow.list_(string), "qa": questions}
    )
    parquet.write_table(arrow.Table.from_pylist(rows, schema), folder / f"{name}-00.parquet")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_shard(folder, "flickr8k-validation", [make_scene(seed) for seed in range(12)])
    write_shard(folder, "coco-validation", [make_scene(seed) for seed in range(20, 26)])
    return folder


def test_captions_that_depend_on_the_picture_beat_the_moved_ones(data: Path) -> None:
    rows = read_rows(data, "flickr8k-validation")
    first = {make_scene(seed).image.tobytes(): make_scene(seed).captions[0] for seed in range(12)}

    def look(request: Request) -> str:
        assert request.question == CAPTION_QUESTION
        return first[request.pictures[0].tobytes()]

    report = measure_captions(Answerer(look), rows, batch=5)
    assert report["cider"] > 3 * report["moved"]["cider"]
    assert report["pictures"] == report["distinct_captions"] == 12
    assert len(report["unchosen"]) == len({sample["id"] for sample in report["unchosen"]}) == 10
    for sample in report["unchosen"]:
        assert sample["caption"] in sample["people"]
    blind = measure_captions(Answerer(lambda request: "a red circle on a white background"), rows)
    assert blind["distinct_captions"] == 1
    assert blind["cider"] == pytest.approx(blind["moved"]["cider"])


def test_yes_or_no_counts_only_those_questions_and_says_what_guessing_gives(data: Path) -> None:
    rows = read_rows(data, "coco-validation")
    truths = [q.answer for row in rows for q in row.questions if q.answer in ("yes", "no")]
    report = measure_yes_no(Answerer(lambda request: "Yes."), rows)
    assert report["questions"] == len(truths) > 0
    assert report["right"] == truths.count("yes") / len(truths)
    assert report["said_yes"] == 1
    assert report["majority"] == max(truths.count("yes"), truths.count("no")) / len(truths)


def test_damaged_and_missing_data_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path, "flickr8k-validation", [make_scene(7), make_scene(8)], cut=300)
    answerer = Answerer(lambda request: "")
    with pytest.raises(DataError, match="row 7 of flickr8k-validation"):
        measure_captions(answerer, read_rows(tmp_path, "flickr8k-validation"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no shard flickr8k-validation"):
        measure(answerer, tmp_path / "empty", limit=2)


def test_a_real_model_is_measured_in_batches_as_it_is_one_by_one(tmp_path: Path, data: Path) -> None:
    assistant = Assistant.load(make_tiny_llava(tmp_path / "model"))
    together, alone = (measure(assistant, data, limit=6, batch=batch) for batch in (16, 1))
    assert together == alone
    assert together["flickr8k-validation"]["pictures"] == 6


def test_the_command_writes_the_scores(tmp_path: Path, data: Path) -> None:
    model, out = make_tiny_llava(tmp_path / "model"), tmp_path / "scores" / "scores.json"
    command = [
        sys.executable,
        "scripts/measure_joey.py",
        str(model),
        "--data",
        str(data),
        "--out",
        str(out),
        "--limit",
        "2",
    ]
    root = Path(__file__).parents[1]
    subprocess.run(command, check=True, cwd=root, capture_output=True)
    report = json.loads(out.read_text())
    assert report["scenes"]["first_seed"] == EVALUATION_SEED
    assert {"model", "seconds", "scenes", "flickr8k-validation", "coco-validation"} == set(report)
    command[2] = str(data)
    wide = {**os.environ, "COLUMNS": "400"}  # lest the message is broken across lines
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, env=wide)
    assert refused.returncode == 2
    assert "config.json" in refused.stderr
