"""Generated scenes: the same on every run, true to their pixels, balanced and varied."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from scene_reader import Seen, border, components, matching, nearest, read, see

from training.data.scene_facts import BACKGROUNDS, COLOURS, SHAPES, WORDS
from training.data.scenes import EVALUATION_SEED, SCENE_KINDS, Scene, SceneKind, make_scene, words_of_scene

FINGERPRINT = """
import hashlib
from training.data.scenes import make_scene
digest = hashlib.sha256()
for seed in range(60):
    scene = make_scene(seed)
    digest.update(scene.image.tobytes() + repr((scene.kind, scene.captions, scene.questions)).encode())
print(digest.hexdigest())
"""


@lru_cache(maxsize=512)
def looked_at(seed: int, kind: SceneKind) -> tuple[Scene, list[Seen]]:
    """A scene and what is seen in it; looking takes much longer than drawing."""
    scene = make_scene(seed, kind=kind)
    return scene, see(scene.image)


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    """Small pictures, for what does not depend on the pixels."""
    return [make_scene(seed, side=64) for seed in range(2000)]


def test_the_same_scene_in_another_process_with_another_hash_seed() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    digest = hashlib.sha256()
    for seed in range(60):
        scene = make_scene(seed)
        digest.update(scene.image.tobytes() + repr((scene.kind, scene.captions, scene.questions)).encode())
    assert digests == {digest.hexdigest() + "\n"}


def test_seeds_differ_and_words_do_not_depend_on_the_side_or_on_naming_the_kind() -> None:
    scenes = [make_scene(seed) for seed in range(200)]
    assert len({scene.image.tobytes() for scene in scenes}) == 200
    for scene in scenes[:40]:
        kind: Any = scene.kind
        again, larger = make_scene(scene.seed, kind=kind), make_scene(scene.seed, side=256)
        assert again.image.tobytes() == scene.image.tobytes()
        assert (larger.captions, larger.questions) == (scene.captions, scene.questions)


def test_words_alone_are_those_of_the_drawn_scene(many: list[Scene]) -> None:
    for scene in many:
        assert words_of_scene(scene.seed) == (scene.captions, scene.questions)
    page = make_scene(7, kind="page")
    assert words_of_scene(7, "page") == (page.captions, page.questions) != words_of_scene(7)


@pytest.mark.parametrize("first", [0, EVALUATION_SEED])
@pytest.mark.parametrize("kind", ["shapes", "count", "position", "size"])
def test_answers_follow_from_the_pixels(kind: SceneKind, first: int) -> None:
    """A reader that shares no code with the generator answers every question alike, references being unique."""
    wrong = []
    for seed in range(first, first + 40):
        scene, things = looked_at(seed, kind)
        for question in scene.questions:
            answer = read(question.question, scene.image, things)
            if answer != question.answer:
                wrong.append((seed, question, answer))
    assert not wrong


@pytest.mark.parametrize("kind", ["shapes", "count", "position", "size"])
def test_captions_mention_what_is_seen_and_nothing_else(kind: SceneKind) -> None:
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    phrase = re.compile(
        rf"\b({'|'.join(numbers)}) (?:large |small )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)?\b"
    )
    for seed in range(40):
        scene, things = looked_at(seed, kind)
        seen = Counter((thing.colour, thing.shape) for thing in things)
        for caption in scene.captions:
            mentioned = {(colour, shape): numbers[number] for number, colour, shape in phrase.findall(caption)}
            assert mentioned == dict(seen), f"scene {seed}: {caption}"


@pytest.mark.parametrize("seed", range(30))
def test_charts_show_the_values_that_are_told(seed: int) -> None:
    scene = make_scene(seed, kind="chart")
    heights = bar_heights(scene)
    ranked = sorted(heights, key=lambda colour: heights[colour])
    checked = 0
    for question in scene.questions:
        text, answer = question.question, question.answer
        if re.search("tallest|highest", text):
            assert answer == ranked[-1]
        elif "shortest" in text:
            assert answer == ranked[0]
        elif text == "How many bars are there?":
            assert answer == str(len(heights))
        elif asked := re.search(r"value.* the (\w+) bar|How high is the (\w+) bar", text):
            assert answer == str(heights[asked[1] or asked[2]])
        elif asked := re.search(r"Is the (\w+) bar (taller|shorter) than the (\w+) bar", text):
            taller = heights[asked[1]] > heights[asked[3]]
            assert (answer == "yes") == (taller == (asked[2] == "taller"))
        elif asked := re.search(r"Is there an? (\w+) bar", text):
            assert (answer == "yes") == (asked[1] in heights)
        else:
            assert text.endswith("the background?")
            continue
        checked += 1
    assert checked >= 3


def bar_heights(scene: Scene) -> dict[str, int]:
    """Heights in lines of the grid, by colour: the longest column of pixels of each vivid block."""
    pixels = np.asarray(scene.image, dtype=float)
    vivid = (pixels.max(axis=2) - pixels.min(axis=2) > 70) & (np.abs(pixels - border(scene.image)[0]).sum(axis=2) > 90)
    heights = {}
    for mask in components(vivid):
        rows, columns = np.nonzero(mask)
        if len(rows) > 80:
            share = np.bincount(columns).max() / scene.image.height
            heights[nearest(np.median(pixels[mask], axis=0), COLOURS)] = round(share / 0.165)
    return heights


@pytest.mark.parametrize("kind", ["word", "digits"])
def test_writing_has_the_told_colour_and_lies_inside_the_picture(kind: SceneKind) -> None:
    for seed in range(40):
        scene = make_scene(seed, kind=kind)
        pixels, frame = np.asarray(scene.image, dtype=float), border(scene.image)
        assert np.abs(frame - np.median(frame, axis=0)).sum(axis=1).max() < 60, f"scene {seed} is cut off"
        distance = np.abs(pixels - np.median(frame, axis=0)).sum(axis=2)
        seen = nearest(np.median(pixels[distance > 0.9 * distance.max()], axis=0), COLOURS)
        told = [q.answer for q in scene.questions if q.kind == "colour" and "background" not in q.question]
        captioned = [c for caption in scene.captions for c in re.findall(r" in (\w+)(?: letters)?(?: on|$)", caption)]
        assert set(told + captioned) <= {seen}
        assert told + captioned


def test_writing_tells_its_words_and_numbers_apart() -> None:
    words, numbers = Counter[str](), Counter[int]()
    for seed in range(1500):
        words[make_scene(seed, 64, "word").questions[0].answer] += 1
        number = make_scene(seed, 64, "digits").questions[0].answer
        assert str(int(number)) == number
        numbers[len(number)] += 1
    assert set(words) == set(WORDS)
    assert min(numbers[length] for length in (1, 2, 3)) > 400


def test_yes_and_no_are_balanced_and_tell_nothing(many: list[Scene]) -> None:
    for kind in SCENE_KINDS:
        answers = Counter(
            q.answer for scene in many if scene.kind == kind for q in scene.questions if q.kind == "yes_no"
        )
        assert set(answers) == {"yes", "no"}
        deviation = abs(answers["yes"] - answers.total() / 2)
        assert deviation < 4 * (answers.total() / 4) ** 0.5, f"{kind}: {answers}"


def test_offered_answers_stand_in_either_order(many: list[Scene]) -> None:
    offers = [q for scene in many for q in scene.questions if q.choices and q.kind != "yes_no"]
    assert all(q.answer in q.choices and len(set(q.choices)) == 2 for q in offers)
    first = sum(q.answer == q.choices[0] for q in offers)
    assert abs(first - len(offers) / 2) < 4 * (len(offers) / 4) ** 0.5


def test_form_of_questions_and_captions(many: list[Scene]) -> None:
    for scene in many:
        texts = [question.question for question in scene.questions]
        assert 4 <= len(texts) <= 8
        assert len(set(texts)) == len(texts)
        assert len(set(scene.captions)) == 2
        assert scene.image.mode == "RGB"
        for text in texts:
            assert text[0].isupper() and text[-1] in "?." and "None" not in text
        for question in scene.questions:
            assert question.answer == question.answer.lower().strip()
            assert len(question.answer.split()) <= 2


def test_everything_occurs(many: list[Scene]) -> None:
    questions = [question for scene in many for question in scene.questions]
    answers = {(question.kind, question.answer) for question in questions}
    kinds = {"colour", "shape", "position", "count", "size", "word", "digits", "chart", "yes_no"}
    assert {scene.kind for scene in many} == set(SCENE_KINDS)
    assert {question.kind for question in questions} == kinds
    assert {("shape", shape) for shape in SHAPES} <= answers
    assert {("colour", colour) for colour in (*COLOURS, *BACKGROUNDS)} <= answers
    assert {("count", str(number)) for number in range(6)} <= answers
    assert {("position", place) for place in ("left", "right", "top", "bottom", "middle", "above", "below")} <= answers
    numbers = Counter(q.answer for q in questions if q.kind == "count" and q.answer.isdigit())
    assert numbers["0"] < 0.05 * numbers.total(), "nothing at all is a rare answer"
    assert max(numbers.values()) < 0.4 * numbers.total(), f"one number would often be right by itself: {numbers}"


@pytest.mark.parametrize("side", [64, 97, 160, 224, 320])
@pytest.mark.parametrize("kind", SCENE_KINDS)
def test_every_side_is_drawn(side: int, kind: SceneKind) -> None:
    for seed in range(5):
        scene = make_scene(seed, side, kind)
        assert scene.image.size == (side, side)
        assert scene.kind == kind
        if kind in ("count", "shapes"):
            assert len(see(scene.image)) == len(looked_at(seed, kind)[1])


def test_things_are_large_enough_to_be_learnt() -> None:
    for seed in range(40):
        for thing in looked_at(seed, "count")[1]:
            assert thing.across * 160 >= 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 1, "side": 63}, "side is 63 pixels, and has to be from 64 to 2048"),
        ({"seed": 1, "side": 4000}, "side is 4000"),
        ({"seed": -1}, "seed is -1, and has to be 0 or more"),
        ({"seed": 1, "kind": "faces"}, "kind is 'faces', and has to be one of shapes, count"),
    ],
)
def test_wrong_arguments_are_explained(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_scene(**arguments)


def test_the_reader_finds_a_wrong_answer_when_there_is_one() -> None:
    """The check of the checks: what is seen in one scene does not answer for another."""
    disagreements = 0
    for seed in range(20):
        scene, other = looked_at(seed, "count")[0], make_scene(seed + 100, kind="count")
        total = next((q for q in scene.questions if "objects" in q.question), None)
        if total:
            disagreements += read(total.question, other.image, see(other.image)) != total.answer
    assert disagreements >= 3
    assert matching("red circles", []) == []
