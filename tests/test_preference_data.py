"""Pairs of answers: rows in every form and their faults, and scenes whose worse answer is wrong by construction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor

from assistant.pixels import pixels_of
from training.data.conversations import RowError
from training.data.lesson_judge import LessonJudge
from training.data.picture_references import PictureFinder
from training.data.pictures import DataError, Picture
from training.data.preference_rows import open_preferences, read_preference, rejected_of
from training.data.preference_scenes import imagined_names, imagining, scene_pair, wrong_answer
from training.data.preferences import CaptionPreferences, Preference, RowPreferences, ScenePreferences
from training.data.scenes import make_scene
from training.evaluation.answers import normalised

PROMPT = [{"role": "user", "content": "What is it?"}]
LOOKED = [{"type": "image_url", "image_url": {"url": "cat.png"}}, {"type": "text", "text": "What is it?"}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"image": "cat.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
        {"image": "cat.png", "prompt": PROMPT, "chosen": said("A cat."), "rejected": said("A dog.")},
        {"Image": "cat.png", "Prompt": json.dumps(PROMPT), "Chosen": "A cat.", "Rejected": json.dumps(said("A dog."))},
        {
            "input": {"messages": [{"role": "user", "content": LOOKED}]},
            "preferred_output": said("A cat."),
            "non_preferred_output": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
        },
    ],
)
def test_every_form_reads_the_same(row: dict[str, Any]) -> None:
    """The same picture, question and two answers, whoever wrote them."""
    conversation = read_preference(row)
    texts = [[message.text for message in one.messages] for one in (conversation, rejected_of(conversation))]
    assert texts == [["What is it?", "A cat."], ["What is it?", "A dog."]]
    assert [picture.where for picture in conversation.pictures] == ["cat.png"]
    assert rejected_of(conversation).pictures == conversation.pictures


def test_earlier_answers_are_read_and_not_learned() -> None:
    asked = [*PROMPT, *said("An animal."), {"role": "user", "content": "Which?"}]
    messages = read_preference({"prompt": asked, "chosen": "A cat.", "rejected": "A dog."}).chat_messages()
    assert [message.get("supervised", True) for message in messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("changed", "field", "words"),
    [
        ({"rejected": " A cat. "}, "rejected", "the same answer as chosen"),
        ({"chosen": ""}, "chosen", "it holds no answer"),
        ({"rejected": None}, "rejected", "it holds no answer"),
        ({"question": " "}, "question", "the question is empty"),
        ({"prompt": said("A cat."), "question": None}, "prompt", "an answer comes before any question"),
        ({"prompt": [], "question": None}, "chosen", "an answer comes before any question"),
        ({"chosen": [{"role": "user", "content": "?"}]}, "chosen", "does not end in an answer"),
        ({"image": " "}, "image", "names no picture"),
    ],
)
def test_a_fault_names_its_field(changed: dict[str, Any], field: str, words: str) -> None:
    row = {"image": "cat.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."} | changed
    row = {name: cell for name, cell in row.items() if name == "rejected" or cell is not None}
    with pytest.raises(RowError, match=words) as caught:
        read_preference(row)
    assert caught.value.fault.field.startswith(field)


def test_what_is_no_pair_is_told_with_the_forms(tmp_path: Path) -> None:
    file = tmp_path / "lessons.csv"
    file.write_text("image,question,answer\ncat.png,What?,A cat.\n")
    with pytest.raises(DataError, match=r"(?s)not recognised as preferences.*image, question, answer.*rejected"):
        open_preferences(file)


def rows_in(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of `rows` in a folder with one picture, cat.png."""
    Image.new("RGB", (32, 32), "red").save(folder / "cat.png")
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def opened(file: Path, model: Path, damaged: float = 0.0) -> RowPreferences:
    rows, processor = open_preferences(file), LlavaProcessor.from_pretrained(model)
    return RowPreferences(rows, PictureFinder(rows.base), LessonJudge(processor, 300), damaged)


def test_rows_become_pairs_and_a_bad_row_is_named_before_anything_trains(tiny_model: Path, tmp_path: Path) -> None:
    good = {"image": "cat.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    pairs = opened(rows_in(tmp_path, [good] * 3), tiny_model)
    pairs.check()
    pair = pairs.sample(1, np.random.default_rng(0))
    assert isinstance(pair, Preference) and tuple(pair.views[0].shape) == (3, 160, 160)
    assert pair.other().messages[-1]["content"][0]["text"] == "A dog." and pair.other().views == pair.views
    # Row 40 is not among the few that are tried first: only looking at every row finds it.
    many = [good] * 39 + [good | {"image": "dog.png"}] + [good] * 60
    with pytest.raises(DataError, match=r"(?s)1 of 100 rows.*row 40 \(line 40\).*image: there is no file.*dog.png"):
        opened(rows_in(tmp_path, many), tiny_model).check()
    with pytest.raises(DataError, match=r"row 3 .*rejected: it is the same answer"):
        opened(rows_in(tmp_path, [good, good, good | {"rejected": "A cat."}]), tiny_model).check()
    opened(rows_in(tmp_path, many), tiny_model, damaged=0.01).check()
    with pytest.raises(DataError, match="over 300"):
        opened(rows_in(tmp_path, [good | {"rejected": "A dog. " * 300}]), tiny_model)


def test_the_worse_answer_about_a_scene_is_wrong_and_of_the_same_sort() -> None:
    """No wrong answer equals the right one, and one is known to every question."""
    generator = np.random.default_rng(0)
    for seed in range(150):
        for question in make_scene(seed, 64).questions:
            wrong = wrong_answer(question, generator)
            assert normalised(wrong) != normalised(question.answer), question
            assert wrong in question.choices if question.choices else wrong.isdigit() == question.answer.isdigit()


def test_a_worse_caption_differs_in_one_thing_that_is_not_there() -> None:
    """What a scene's own captions name is there; what is put instead is not, and its article fits."""
    generator = np.random.default_rng(0)
    changed = 0
    for seed in range(150):
        scene = make_scene(seed, 64)
        for caption in scene.captions:
            assert imagined_names(caption, scene)[1] == 0, caption
            imagined = imagining(caption, scene, generator)
            if imagined is None or scene.kind not in ("shapes", "count", "position", "size"):
                continue
            changed += 1
            assert imagined_names(imagined, scene)[1] == 1, (caption, imagined)
            pairs = zip(caption.split(), imagined.split(), strict=True)
            (other,) = (now for was, now in pairs if was != now and now not in ("a", "an"))
            wrong_article = "a" if other[0] in "aeiou" else "an"
            assert f" {wrong_article} {other}" not in f" {imagined}", imagined
    assert changed > 100


def test_names_are_counted_once_and_backgrounds_are_no_things() -> None:
    scene = make_scene(4, 64, "position")
    assert imagined_names("A triangle on a dark green background.", scene)[0] == 1
    assert imagined_names("Nothing at all.", scene) == (0, 0)
    both = imagined_names("a purple purple zebra and a grey hat", scene)
    assert both[0] == 2


def test_pairs_of_scenes_are_the_same_on_every_run() -> None:
    pairs = ScenePreferences(50, 64)
    once, again = (pairs.sample(7, np.random.default_rng(3)) for _ in range(2))
    assert once.messages == again.messages and once.rejected == again.rejected
    assert once.messages[0] == once.rejected[0] and once.messages[1] != once.rejected[1]
    kinds = {scene_pair(make_scene(s, 64), np.random.default_rng(s)).question[:8] for s in range(40)}
    assert len(kinds) > 5


class Pictures(list[Picture]):
    """Pictures by index."""


def test_captions_of_other_pictures_are_worse() -> None:
    """The worse caption belongs to another picture, and is none of the picture's own."""
    view = pixels_of(make_scene(1, 64).image)
    pictures = Pictures(Picture(str(n), view, (f"a thing {n}", "a thing")) for n in range(4))
    pairs = CaptionPreferences(pictures, 64, pictures)
    for place in range(4):
        for seed in range(5):
            pair = pairs.sample(place, np.random.default_rng(seed))
            right, wrong = (one[1]["content"][0]["text"] for one in (pair.messages, pair.rejected))
            assert right in (f"A thing {place}.", "A thing.")
            assert wrong.startswith("A thing ") and str(place) not in wrong
    same = Pictures(Picture(str(n), view, ("a thing",)) for n in range(3))
    with pytest.raises(DataError, match="have the same captions"):
        CaptionPreferences(same, 64, same).sample(0, np.random.default_rng(0))
    with pytest.raises(DataError, match="two pictures or more"):
        CaptionPreferences(same, 64, Pictures(same[:1]))
