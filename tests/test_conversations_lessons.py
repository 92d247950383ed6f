"""Lessons from conversations, their mixture over a run, and a stage that is taught with them."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from assistant.chat import assistant_message, encode_conversation
from assistant.checkpoint import load_llava
from assistant.images import open_picture
from assistant.pixels import pixels_of
from assistant.towers import normalised
from tests.test_conversations import encoded, write_lines
from tests.tiny import make_tiny_llava
from training.config import ConversationSource, InstructStage, Recipe
from training.data.conversation_lessons import ConversationLessons
from training.data.lesson_judge import LessonJudge
from training.data.mixing import Phase, apportioned, mixture_plan, phased_plan, with_replay
from training.data.picture_references import PictureFinder
from training.data.pictures import DataError
from training.data.recognise import recognise
from training.data.samples import Mixture
from training.data.views import square
from training.lesson_sets import lesson_sets, mixture_weights, one_aside_in
from training.objectives.instruct import InstructObjective, Lesson
from training.recipe import run_recipe

SCHEDULE = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "log_every": 1, "bf16": False}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return load_llava(model_folder)


@pytest.fixture(scope="module")
def judge(tiny: tuple[LlavaForConditionalGeneration, LlavaProcessor]) -> LessonJudge:
    return LessonJudge(tiny[1], longest=400)


def talk(number: int, *pictures: str) -> dict[str, Any]:
    value = "<image>\n" * len(pictures) + f"Question {number}?"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": str(number), "images": list(pictures), "conversations": turns}


def lessons_of(folder: Path, rows: list[dict[str, Any]], judge: LessonJudge, damaged: float = 0.01) -> Any:
    opened = recognise(write_lines(folder / "data.jsonl", rows))
    return ConversationLessons(opened, PictureFinder(opened.base), judge, damaged)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(encoded((20 * number, 100, 200 - 10 * number)))  # type: ignore[arg-type]
    return tmp_path


def test_a_lesson_has_its_messages_and_its_pictures_in_their_places(folder: Path, judge: LessonJudge) -> None:
    row = {
        "images": ["3.png", "5.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hello."},
            {"from": "gpt", "value": "Hi."},
            {"from": "human", "value": "First <image>, then <image>: which is red?"},
            {"from": "gpt", "value": "None."},
        ],
    }
    lesson = lessons_of(folder, [row], judge).sample(0, np.random.default_rng(0))
    assert lesson.is_dialogue and lesson.turns == ()
    places = [[part["type"] for part in message["content"]] for message in lesson.messages]
    assert places == [["text"], ["text"], ["text"], ["text", "image", "text", "image", "text"], ["text"]]
    for view, name in zip(lesson.views, ("3.png", "5.png"), strict=True):
        assert torch.equal(view, square(pixels_of(open_picture(folder / name)), 160))
    assert lesson.conversations() == [list(lesson.messages)]


def test_the_loss_of_a_conversation_is_transformers_own(
    folder: Path, judge: LessonJudge, tiny: tuple[LlavaForConditionalGeneration, LlavaProcessor]
) -> None:
    """A text-only row, many pictures, a picture in the second question, a system message: all in one batch."""
    model, processor = tiny
    late = talk(3, "4.png")
    late["conversations"] = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello."},
        {"from": "gpt", "value": "Hi there."},
        *late["conversations"],
    ]
    opened = lessons_of(folder, [talk(1), talk(2, "1.png", "2.png"), late], judge)
    lessons = [opened.sample(index, np.random.default_rng(0)) for index in range(3)]
    objective = InstructObjective(model, processor, ["projector", "language"], longest=400)
    with torch.no_grad():
        ours = float(objective(**objective.collate(lessons))["answer_loss"])
        total, count = 0.0, 0
        for lesson in lessons:
            coded = encode_conversation(processor.tokenizer, lesson.messages, 100)
            ids, mask = torch.tensor([coded.ids]), torch.tensor([coded.supervised])
            views = normalised(torch.stack(lesson.views), processor.image_processor) if lesson.views else None
            theirs = model(input_ids=ids, pixel_values=views, labels=ids.masked_fill(~mask, -100))
            total, count = total + float(theirs.loss) * int(mask.sum()), count + int(mask.sum())
    assert ours == pytest.approx(total / count, rel=1e-4)


def test_old_lessons_say_the_same_messages_as_before() -> None:
    """Turns beside each other each have all pictures; a dialogue has them before its first question."""
    views = (torch.zeros(3, 4, 4, dtype=torch.uint8),) * 2
    turns = (("What?", "a cat"), ("Where?", "left"))
    picture = {"type": "image"}
    first = {"role": "user", "content": [picture, picture, {"type": "text", "text": "What?"}]}
    second = {"role": "user", "content": [picture, picture, {"type": "text", "text": "Where?"}]}
    bare = {"role": "user", "content": [{"type": "text", "text": "Where?"}]}
    answers = [assistant_message("a cat"), assistant_message("left")]
    assert Lesson("n", views, turns).conversations() == [[first, answers[0]], [second, answers[1]]]
    assert Lesson("n", views, turns, is_dialogue=True).conversations() == [[first, answers[0], bare, answers[1]]]


def test_bad_rows_are_skipped_within_the_budget_and_named(
    folder: Path, judge: LessonJudge, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [talk(number, f"{number % 12}.png") for number in range(100)]
    rows[7]["images"] = ["nowhere.png"]
    with caplog.at_level(logging.WARNING):
        lessons = lessons_of(folder, rows, judge)
        taken = [lessons.sample(index, np.random.default_rng(0)).name for index in (6, 7, 8, 7)]
    assert [name.split(" of ")[0] for name in taken] == [f"row {n} (line {n})" for n in (7, 9, 9, 9)]
    named = [record.getMessage() for record in caplog.records if "skipped a row" in record.getMessage()]
    assert len(named) == 1 and "row 8 (line 8): images[0]: there is no file" in named[0]


def test_too_many_bad_rows_end_the_run_and_strict_ends_it_at_the_first(folder: Path, judge: LessonJudge) -> None:
    rows = [talk(number, f"{number % 12}.png") for number in range(100)]
    rows[70]["conversations"][1]["from"] = "robot"
    strict = r"1 of 100 rows cannot be taught .*row 71 \(line 71\)"
    with pytest.raises(DataError, match=strict):
        lessons = lessons_of(folder, rows, judge, damaged=0)
        for index in range(100):
            lessons.sample(index, np.random.default_rng(0))
    rows[71]["conversations"][1]["value"] = ""
    with pytest.raises(DataError, match="2 of 100 rows cannot be taught"):
        lessons = lessons_of(folder, rows, judge)
        for index in range(100):
            lessons.sample(index, np.random.default_rng(0))


def test_a_row_that_breaks_in_the_middle_of_training_is_named(folder: Path, judge: LessonJudge) -> None:
    """A picture that is cut off after the first steps: the next row takes its place, or a strict run ends."""
    rows = [talk(number, f"{number}.png") for number in range(12)]
    lenient, strict = lessons_of(folder, rows, judge, 0.1), lessons_of(folder, rows, judge, 0)
    assert strict.sample(4, np.random.default_rng(0)).name.startswith("row 5 ")
    (folder / "4.png").write_bytes(b"\x89PNG\r\n")
    assert lenient.sample(4, np.random.default_rng(0)).name.startswith("row 6 ")
    with pytest.raises(DataError, match=r"row 5 \(line 5\): images\[0\]: 4.png: not a picture"):
        strict.sample(4, np.random.default_rng(0))


def test_rows_kept_aside_share_no_picture_with_those_that_are_trained_on(folder: Path, judge: LessonJudge) -> None:
    rows = [talk(number, f"{number % 12}.png") for number in range(96)]
    trained, validating = lessons_of(folder, rows, judge).kept_aside(4)
    assert len(trained) + len(validating) == 96
    generator = np.random.default_rng(0)

    def names(lessons: Any) -> set[int]:
        found = [lessons.sample(index, generator).name for index in range(len(lessons))]
        return {(int(name.split()[1]) - 1) % 12 for name in found}

    assert names(trained) | names(validating) == set(range(12))
    assert not names(trained) & names(validating)
    with pytest.raises(DataError, match="held_out_conversations"):
        lessons_of(folder, [talk(number, "1.png") for number in range(9)], judge).kept_aside(4)


@pytest.mark.parametrize(("rows", "one_in"), [(2, 5), (80, 5), (160, 10), (400, 25), (512, 32), (600_000, 32)])
def test_few_rows_keep_a_larger_share_aside(rows: int, one_in: int) -> None:
    """A fifth at most, sixteen where there are enough, one in 32 of many."""
    assert one_aside_in(rows) == one_in


# -- Phases and replay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 7, 100, 1001])
def test_shares_of_each_phase_are_exact_and_each_place_is_the_same_on_every_run(total: int) -> None:
    sizes = [5, 40, 3]
    phases = [Phase(0, (1, 1, 0)), Phase(0.25, (0, 3, 1)), Phase(0.8, (0.2, 0.5, 0.3))]
    source, index = phased_plan(sizes, phases, total, seed=3)
    again = phased_plan(sizes, phases, total, seed=3)
    assert (source == again[0]).all() and (index == again[1]).all()
    edges = [0, round(0.25 * total), round(0.8 * total), total]
    for phase, start, end in zip(phases, edges, edges[1:], strict=False):
        counts = np.bincount(source[start:end], minlength=3)
        exact = np.array(phase.weights) / sum(phase.weights) * (end - start)
        assert (np.abs(counts - exact) < 1).all()
        assert not counts[np.array(phase.weights) == 0].any()
    for number, size in enumerate(sizes):
        drawn = index[source == number]
        for start in range(0, len(drawn), size):
            assert len(set(drawn[start : start + size])) == len(drawn[start : start + size])
    if total > 100:
        assert (source != phased_plan(sizes, phases, total, seed=4)[0]).any()


def test_apportioned_is_the_largest_remainder_method() -> None:
    """Against the method in plain words: whole parts first, then the largest remainders, the first of equals."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        shares = generator.dirichlet(np.ones(4))
        total = int(generator.integers(0, 60))
        whole = [int(share * total) for share in shares]
        rest = [share * total - part for share, part in zip(shares, whole, strict=True)]
        for _ in range(total - sum(whole)):
            largest = rest.index(max(rest))
            whole[largest], rest[largest] = whole[largest] + 1, -1.0
        assert apportioned(shares, total).tolist() == whole


def test_replay_has_its_share_at_every_time() -> None:
    phases = with_replay([Phase(0, (1, 0)), Phase(0.5, (1, 3))], replayed=(2, 1), share=0.15)
    source, _ = phased_plan([10, 10, 10, 10], phases, 2000, seed=0)
    for half in (source[:1000], source[1000:]):
        assert (half >= 2).sum() == 150
        assert abs((half == 2).sum() - 100) < 1
    assert np.bincount(source[:1000], minlength=2)[:2].tolist() == [850, 0]
    assert abs((source[1000:] == 1).sum() - 850 * 3 / 4) < 1


@pytest.mark.parametrize(
    "phases",
    [
        [],
        [Phase(0.1, (1, 1))],
        [Phase(0, (1, 1)), Phase(0, (1, 2))],
        [Phase(0, (1,))],
        [Phase(0, (0, 0))],
        [Phase(0, (1, -1))],
        [Phase(0, (1, 1)), Phase(1.0, (1, 2))],
        [Phase(0, (1, 1)), Phase(0.5, (0, 1))],
    ],
)
def test_phases_that_make_no_sense_are_refused(phases: list[Phase]) -> None:
    with pytest.raises(ValueError, match=r"phases start|weights|empty"):
        phased_plan([4, 0], phases, 10, seed=0)


def test_a_mixture_without_phases_is_the_one_it_was() -> None:
    source, index = mixture_plan([4, 9], [1, 2], 50, seed=1)

    class Numbers:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

        def sample(self, index: int, generator: np.random.Generator) -> tuple[int, int, float]:
            return self.size, index, float(generator.random())

    plain, phased = Mixture([Numbers(4), Numbers(9)], [1, 2], 50, 1), Mixture([Numbers(4)], [Phase(0, (1,))], 50, 1)
    assert [plain[place][:2] for place in range(50)] == [((4, 9)[s], i) for s, i in zip(source, index, strict=True)]
    assert [phased[place] for place in range(50)] == [phased[place] for place in range(50)]


# -- A stage -----------------------------------------------------------------------------------------------------------


def stage(**fields: Any) -> InstructStage:
    return InstructStage.model_validate(
        {"kind": "instruct", "name": "lessons", "start_from": "tiny", "trains": ["projector"], "schedule": SCHEDULE}
        | {"held_out_samples": 4}
        | fields
    )


def test_phases_of_a_recipe_name_every_source_in_its_order() -> None:
    sources = {"mixture": [{"scenes": 5, "weight": 2, "use": "questions"}], "conversations": [{"conversations": "a"}]}
    later = [{"start": 0.5, "mixture": [0], "conversations": [1]}]
    assert mixture_weights(stage(**sources)) == [2, 1]
    assert mixture_weights(stage(**sources, phases=later)) == [Phase(0, (2, 1)), Phase(0.5, (0, 1))]
    replay = {"replay": [{"scenes": 5, "weight": 7, "use": "questions"}], "replay_share": 0.25}
    (only,) = mixture_weights(stage(**sources, **replay))
    assert isinstance(only, Phase)
    assert only.weights == pytest.approx((0.5, 0.25, 0.25))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "name what is taught"),
        ({"mixture": [{"scenes": 5, "weight": 1}]}, "lessons that validate"),
        ({"conversations": [{"conversations": "a", "weight": 0}]}, "every weight is 0"),
        ({"conversations": [{"conversations": "a"}], "phases": [{"start": 0.5}]}, "0 weights for 1 conversations"),
        (
            {"conversations": [{"conversations": "a"}], "phases": [{"start": 0.5, "conversations": [0]}]},
            "every weight is 0",
        ),
        (
            {
                "conversations": [{"conversations": "a"}],
                "phases": [{"start": 0.5, "conversations": [1]}, {"start": 0.2, "conversations": [1]}],
            },
            "one after the other",
        ),
        ({"conversations": [{"conversation": "a"}]}, "Extra inputs"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        stage(**fields)


def test_a_stage_mixes_conversations_scenes_and_replay(folder: Path, judge: LessonJudge) -> None:
    rows = [talk(number, f"{number % 12}.png") for number in range(60)]
    write_lines(folder / "data.jsonl", rows)
    wanted = stage(
        conversations=[{"conversations": "data.jsonl"}],
        mixture=[{"scenes": 50, "weight": 1, "use": "questions"}],
        replay=[{"scenes": 9, "weight": 1, "use": "questions"}],
        replay_share=0.2,
    )
    trained, validating = lesson_sets(wanted, judge, lambda: folder, [], samples=50)
    names = [trained[place].name for place in range(50)]
    assert sum(name.startswith("row") for name in names) == 20
    assert np.bincount(trained.source_of).tolist() == [20, 20, 10]
    assert len(validating) == 4 and all(validating[place].name.startswith("row") for place in range(4))
    assert [trained[place].name for place in range(50)] == names


def test_a_recipe_teaches_conversations_end_to_end(folder: Path, model_folder: Path) -> None:
    """Two steps: the projector moves, the rest stays, and the provenance knows the data."""
    rows: list[dict[str, Any]] = [talk(number, f"{number % 12}.png") for number in range(40)]
    rows += [talk(number) for number in range(40, 60)]
    write_lines(folder / "data.jsonl", rows)
    lesson_stage = stage(start_from=str(model_folder), conversations=[{"conversations": "data.jsonl"}])
    recipe = Recipe(name="talks", about="teaches rows", stages=(lesson_stage,), publish="lessons", dtype="float32")
    result = run_recipe(recipe, folder, folder / "runs")
    before, after = (load_llava(path)[0].state_dict() for path in (model_folder, result))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)
    provenance = json.loads((result / "provenance.json").read_text())
    assert "conversations data.jsonl" in provenance["data"]
    shutil.rmtree(folder / "runs")
    (folder / "data.jsonl").unlink()
    with pytest.raises(DataError, match="there is no file"):
        run_recipe(recipe, folder, folder / "runs")


def test_a_source_says_what_it_reads() -> None:
    source = ConversationSource(conversations="a.json")
    assert (source.weight, source.damaged, source.downloads, source.hub) == (1.0, 0.01, False, False)
