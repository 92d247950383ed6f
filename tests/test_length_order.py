"""Lessons of like length in one micro-batch: the same lessons a step, the same gradient, less padding."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from assistant.checkpoint import load_llava
from tests.small_runs import assert_same_gradients
from tests.test_instruct_levers import first_gradient, objective_on, uneven_lessons
from training.config import ConversationSource, InstructStage, Schedule
from training.data.length_order import LongestFirst
from training.data.lesson_judge import LessonJudge
from training.data.samples import Mixture, SceneLessons, TextLessons
from training.data.texts import TextRow
from training.lesson_sets import open_lessons
from training.objectives.instruct import Lesson
from training.stages import Workshop, prepared_lessons

PER_PICTURE = 100


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows: with no picture, one or two, and answers of one to forty words."""
    place = tmp_path_factory.mktemp("data")
    Image.new("RGB", (40, 40), (200, 0, 0)).save(place / "red.png")
    lines = []
    for number in range(40):
        pictures = [{"type": "image_url", "image_url": {"url": "red.png"}}] * (number % 3)
        question = [*pictures, {"type": "text", "text": f"What is number {number}?"}]
        answer = " ".join(["word"] * (1 + number * 7 % 40))
        lines.append(
            json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        )
    (place / "rows.jsonl").write_text("\n".join(lines))
    return place / "rows.jsonl"


def stage(tiny_model: Path, data: Path, packing: bool, batch_size: int = 4, accumulation: int = 2) -> InstructStage:
    schedule = Schedule(steps=5, batch_size=batch_size, accumulation=accumulation, learning_rate=1e-3, bf16=False)
    return InstructStage(
        kind="instruct",
        name="tune",
        start_from=str(tiny_model),
        trains=("projector",),
        packing=packing,
        conversations=(ConversationSource(conversations=str(data)),),
        schedule=schedule,
    )


def test_a_step_sees_the_same_lessons(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The longest first, by what the model really reads, and with less padding."""
    workshop = Workshop(tmp_path, None)
    objective, grouped, _ = prepared_lessons(stage(tiny_model, data, packing=False), workshop)
    assert isinstance(grouped, LongestFirst)
    plain = grouped.mixture
    assert len(grouped) == len(plain) == 40
    padded = {"grouped": 0, "plain": 0}
    for first in range(0, 40, 8):
        ours = [grouped[place] for place in range(first, first + 8)]
        theirs = [plain[place] for place in range(first, first + 8)]
        assert sorted(lesson.name for lesson in ours) == sorted(lesson.name for lesson in theirs)
        lengths = [len(objective.pack(lesson).ids) for lesson in ours]
        assert all(longer > shorter - 10 for longer, shorter in itertools.pairwise(lengths)), lengths
        for name, lessons in (("grouped", ours), ("plain", theirs)):
            for part in (lessons[:4], lessons[4:]):
                padded[name] += objective.collate(part)["ids"].numel()
    assert padded["grouped"] < 0.9 * padded["plain"]
    with pytest.raises(IndexError):
        grouped[40]


def test_the_gradient_of_a_step_stays(tiny_model: Path, tmp_path: Path) -> None:
    """Eight uneven lessons as two micro-batches, in their own order and from the longest on."""
    lessons = uneven_lessons()
    objective = objective_on(tiny_model)
    longest_first = sorted(lessons, key=lambda lesson: -len(objective.pack(lesson).ids))
    assert [lesson.name for lesson in longest_first] != [lesson.name for lesson in lessons]
    plain = first_gradient(tiny_model, tmp_path / "plain", 4, 2, lessons)
    assert_same_gradients(first_gradient(tiny_model, tmp_path / "grouped", 4, 2, longest_first), plain)


@pytest.mark.parametrize(("packing", "accumulation"), [(True, 2), (False, 1)])
def test_where_it_would_save_nothing_the_order_stays(
    tiny_model: Path, data: Path, tmp_path: Path, packing: bool, accumulation: int
) -> None:
    """Packed rows have no padding, and one micro-batch a step is what it is."""
    made = stage(tiny_model, data, packing, accumulation=accumulation)
    assert isinstance(prepared_lessons(made, Workshop(tmp_path, None))[1], Mixture)


def test_extents_of_every_source(tiny_model: Path, data: Path) -> None:
    """Rows, scenes and texts; they order as the real lengths do."""
    judge = LessonJudge(load_llava(tiny_model)[1], 900)
    rows = open_lessons(ConversationSource(conversations=str(data)), lambda: data.parent, judge)
    assert rows.extent(2) == (2, len("What is number 2?") + len(" ".join(["word"] * 15)))
    texts = TextLessons([TextRow("s", "an answer", "a prompt")], 300)
    assert texts.extent(0) == (0, len("an answer") + len("a prompt"))
    scenes = SceneLessons(10, 160)
    real = [sum(len(q) + len(a) for q, a in scenes.sample(n, np.random.default_rng(n)).turns) for n in range(10)]
    assert scenes.extent(3)[0] == 1 and min(real) < scenes.extent(3)[1] < max(real)
    mixture: Mixture[Lesson] = Mixture([rows, texts, scenes], [1, 1, 1], 30, seed=0)
    grouped = LongestFirst(mixture, 30, PER_PICTURE)
    pictures = [len(grouped[place].views) for place in range(30)]
    assert pictures == sorted(pictures, reverse=True)
