"""Before and after teaching: what is asked, how it is counted, what is warned of, and the card."""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from assistant.answering import Assistant, Request
from assistant.chat import assistant_message, encode_conversation, user_message
from assistant.images import open_picture
from tests.question_rows import write_question_rows
from tests.tiny import make_tiny_llava
from training import teaching_questions
from training.config import InstructStage, Recipe
from training.data.scenes import EVALUATION_SEED, make_scene
from training.evaluation.answers import normalised
from training.evaluation.scores import wilson_interval
from training.lesson_sets import open_lessons
from training.stages import Workshop
from training.teaching import Wish, teach, teaching_recipe
from training.teaching_card import CARD, OTHER_CARD, card_of, is_ours, kept_card, signed, write_card
from training.teaching_questions import (
    KINDS,
    Answers,
    Examination,
    held_out_answers,
    held_out_loss,
    held_out_questions,
    scene_questions,
)
from training.teaching_report import compared, made_of, report_teaching
from ui.command_line import app


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough scenes for a test; how many there are says nothing of how they are asked."""
    monkeypatch.setattr(teaching_questions, "OF_EACH_KIND", 1)
    monkeypatch.setattr(teaching_questions, "ABSENT", 8)


def taught(model: Path, rows: Path, runs: Path, **wish: object) -> tuple[Recipe, InstructStage, Workshop]:
    recipe = teaching_recipe(Wish(str(model), str(rows), out=runs / "out", **wish))  # type: ignore[arg-type]
    stage = recipe.stages[0]
    assert isinstance(stage, InstructStage)
    return recipe, stage, Workshop(runs / "out", None)


def test_the_counts_equal_a_plain_loop_over_answers(model: Path, tmp_path: Path, few_questions: None) -> None:
    """One question after the other with `Assistant`, on pictures read from their files, counted by hand."""
    rows = write_question_rows(tmp_path / "rows", 36, 160, 2, lambda right: "yes")
    recipe, stage, workshop = taught(model, rows, tmp_path, mode="full", steps=2, batch_size=4, learning_rate=1e-2)
    result = teach(recipe, tmp_path)
    report = report_teaching(recipe, tmp_path, Console(quiet=True))
    assert report is not None and report.new.before is not None and report.new.after is not None
    assistants = [Assistant.load(folder) for folder in (model, result)]
    asked = held_out_questions(stage, workshop, assistants[0].processor)
    with rows.open() as file:
        by_question = {(row["image"], row["question"]): row for row in csv.DictReader(file)}
    kept = [row for row in by_question.values() if any(one.question == row["question"] for one in asked)]
    seen = [(row, one) for one in asked for row in kept if row["question"] == one.question and _shows(one, row, rows)]
    assert len(seen) == len(asked) == report.new.questions >= 4
    for assistant, share in zip(assistants, (report.new.before, report.new.after), strict=True):
        given = []
        for row, one in seen:
            request = Request(row["question"], (open_picture((rows.parent / row["image"]).read_bytes()),))
            given.append(assistant.answer_batch([request], one.answer_tokens + teaching_questions.ANSWER_MARGIN)[0])
        assert given == held_out_answers(assistant, asked)
        right = sum(normalised(said) == normalised("yes") for said in given)
        assert share.share == right / len(given)
        assert (share.low, share.high) == wilson_interval(right / len(given), len(given))
    known, absent = scene_questions()
    assert report.known.questions == len(known) == 9 and report.hallucination.questions == len(absent) == 8
    for assistant, known_share, imagined in zip(
        assistants,
        (report.known.before, report.known.after),
        (report.hallucination.before, report.hallucination.after),
        strict=True,
    ):
        said = [assistant.answer_batch([Request(q.question.question, (q.picture,))], 8)[0] for q in known]
        right = sum(normalised(a) == normalised(q.question.answer) for a, q in zip(said, known, strict=True))
        yes = [assistant.answer_batch([Request(q.question.question, (q.picture,))], 8)[0] for q in absent]
        assert known_share is not None and known_share.share == right / 9
        assert imagined is not None and imagined.share == sum(a.lower().startswith("yes") for a in yes) / 8


def _shows(one: teaching_questions.HeldOutQuestion, row: dict[str, str], rows: Path) -> bool:
    picture = open_picture((rows.parent / row["image"]).read_bytes())
    return torch.equal(one.views[0], torch.tensor(list(picture.tobytes())).view(160, 160, 3).permute(2, 0, 1).byte())


def test_what_is_asked_of_scenes_is_fixed_and_never_trained_on() -> None:
    """Each kind alike, and each thing that is asked for is missing: another scene's words say so."""
    known, absent = scene_questions()
    kinds = [one.question.kind for one in known]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(KINDS, 7) and len(absent) == 64
    again, _ = scene_questions()
    assert [one.question for one in again] == [one.question for one in known]
    scenes = {scene.image.tobytes(): scene for scene in map(make_scene, range(EVALUATION_SEED, EVALUATION_SEED + 100))}
    named = [(one.question.question, scenes[one.picture.tobytes()].regions) for one in absent[:12]]
    checked = 0
    for question, regions in named:
        *_, colour, shape = question.removesuffix("?").removesuffix(" in the picture").split()
        assert all(set(region.words) != {colour, shape} for region in regions)
        checked += bool(regions)
    assert checked >= 8


def test_a_model_taught_to_say_yes_is_told_to_imagine(model: Path, tmp_path: Path, few_questions: None) -> None:
    """It says yes to what is not there as well, and that is said with the way out."""
    rows = write_question_rows(tmp_path / "rows", 20, 160, 2, lambda right: "yes")
    recipe, _, _ = taught(model, rows, tmp_path, mode="full", steps=32, batch_size=4, learning_rate=5e-3)
    teach(recipe, tmp_path)
    console = Console(record=True, width=200)
    report = report_teaching(recipe, tmp_path, console)
    assert report is not None
    before, after = report.hallucination.before, report.hallucination.after
    assert before is not None and after is not None and before.share == 0.0 and after.share >= 0.5
    assert report.new.after is not None and report.new.after.share >= 0.5
    assert report.loss_before is not None and report.loss_after is not None and report.loss_after < report.loss_before
    assert any(line.startswith("It imagines more") and "--replay 0.2" in line for line in report.warnings)
    told = console.export_text()
    assert "It imagines more" in told and "Before and after" in told and f"{after.share:.1%}" in told
    card = (tmp_path / "out" / "model" / CARD).read_text()
    assert "**It imagines more" in card and is_ours(card)


def answers(asked: Examination, right: Callable[[int], bool], yes: int) -> Answers:
    known = [one.question.answer if right(place) else "nothing" for place, one in enumerate(asked.known)]
    return Answers([], None, known, ["Yes."] * yes + ["no"] * (len(asked.absent) - yes))


@pytest.mark.parametrize(
    ("mode", "wrong", "yes", "said"),
    [
        ("lora", 0, 0, []),
        ("lora", 1, 1, []),  # 1.6 points of 63 and of 64
        ("lora", 2, 0, ["It forgot: of 63 questions about generated scenes it answers 97% right, and 100% before."]),
        ("align", 63, 2, ["It forgot: ", "It imagines more: asked 64 times"]),
    ],
)
def test_a_fall_of_more_than_two_points_is_said(
    mode: str, wrong: int, yes: int, said: Sequence[str], model: Path, tmp_path: Path
) -> None:
    """And no less; without a held-out row it says that too. Only a language model can be given --replay."""
    rows = write_question_rows(tmp_path / "rows", 3, 160, 2)
    recipe, stage, workshop = taught(model, rows, tmp_path, mode=mode, steps=1)
    asked = Examination((), *scene_questions())
    (workshop.runs / stage.name).mkdir(parents=True)
    (workshop.runs / stage.name / "done.json").write_text('{"seconds": 3}')
    made = made_of(recipe, stage, workshop)
    report = compared(
        made, stage, asked, answers(asked, lambda place: True, 0), answers(asked, lambda n: n >= wrong, yes)
    )
    assert len(report.warnings) == len(said)
    assert all(line.startswith(start) for line, start in zip(report.warnings, said, strict=True))
    assert all(("--replay" in line) == (mode == "lora") for line in report.warnings)
    assert report.new.cells()[1:4] == ("0", "not known", "not known")
    assert "No row of your data was kept aside" in report.remarks[0] and report.remarks[0] in card_of(report, None)


def test_any_conversation_is_asked_as_training_reads_it(model: Path, tmp_path: Path) -> None:
    """Text alone, several pictures, a system message, turns that are only read; the loss is transformers' own."""
    rows = tmp_path / "rows.jsonl"
    for number in range(3):
        make_scene(number).image.save(tmp_path / f"{number}.png")
    pictures = [{"type": "image", "image": str(tmp_path / f"{number}.png")} for number in (1, 2)]
    two = [*pictures, {"type": "text", "text": "Which is red?"}]
    talks = [
        [user_message("How many is two?"), assistant_message("two")],
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": two},
            {"role": "assistant", "content": "the first", "weight": 0},
            {"role": "user", "content": "And which is blue?"},
            {"role": "assistant", "content": "the second one"},
            {"role": "user", "content": "And green?"},
            {"role": "assistant", "content": "none"},
        ],
    ]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    _, stage, workshop = taught(model, rows, tmp_path, mode="lora", steps=1)
    assistant = Assistant.load(model)
    judge = teaching_questions.LessonJudge(assistant.processor, stage.longest)
    lessons = open_lessons(stage.conversations[0], workshop.data_folder, judge)
    generator = teaching_questions.np.random.default_rng(0)
    asked = [
        teaching_questions._first_question(lessons.sample(place, generator), assistant.processor) for place in range(2)
    ]
    assert [(one.question, one.answer, len(one.views)) for one in asked] == [
        ("How many is two?", "two", 0),
        ("And which is blue?", "the second one", 2),
    ]
    tokenizer = assistant.processor.tokenizer
    read = tokenizer.decode([token for token in asked[1].prompt if token != tokenizer.convert_tokens_to_ids("<image>")])
    assert "Be short." in read and "the first" in read and read.rstrip().endswith("<|assistant|>")
    assert "the second" not in read and "green" not in read
    alone = [held_out_answers(assistant, [one])[0] for one in asked]
    together = held_out_answers(assistant, asked)  # up to the length of the longer right answer
    assert all(text.startswith(start) and start for text, start in zip(together, alone, strict=True))
    total, tokens = 0.0, 0
    for one in asked:
        encoded = encode_conversation(tokenizer, one.lesson.messages, 100)
        labels = torch.tensor([[i if s else -100 for i, s in zip(encoded.ids, encoded.supervised, strict=True)]])
        seen = [Image.fromarray(view.permute(1, 2, 0).numpy()) for view in one.lesson.views]
        pixels = assistant.processor.image_processor(seen, return_tensors="pt") if seen else {}
        with torch.no_grad():
            loss = assistant.model(input_ids=torch.tensor([encoded.ids]), labels=labels, **pixels).loss
        total, tokens = total + float(loss) * int((labels != -100).sum()), tokens + int((labels != -100).sum())
    assert held_out_loss(assistant, asked, stage.longest) == pytest.approx(total / tokens, rel=1e-4)


def test_a_card_that_a_person_wrote_or_changed_stays(tmp_path: Path) -> None:
    """Also where the folder is written anew meanwhile, and where that fails; ours is written over."""
    ours = signed("---\na: b\n---\n", "\n# Mine\n")
    assert is_ours(ours) and not is_ours(ours + "More.\n") and not is_ours("# Mine\n")
    for card in ("# Written by hand\n", ours.replace("# Mine", "# Mine, and better")):
        (tmp_path / CARD).write_text(card)
        with pytest.raises(OSError, match="full"), kept_card(tmp_path):
            (tmp_path / CARD).unlink()
            raise OSError("full")
        assert write_card(tmp_path, ours).name == OTHER_CARD
        assert (tmp_path / CARD).read_text() == card and (tmp_path / OTHER_CARD).read_text() == ours
    (tmp_path / CARD).write_text(ours)
    with kept_card(tmp_path):
        (tmp_path / CARD).unlink()
    assert not (tmp_path / CARD).exists()
    assert write_card(tmp_path, ours).name == CARD == write_card(tmp_path, ours).name


@pytest.mark.parametrize("kind", ["--lora", "--qlora"])
def test_the_command_writes_card_numbers_and_curves(
    kind: str, model: Path, tmp_path: Path, few_questions: None
) -> None:
    """And a second run leaves the card that a person has changed since."""
    rows = write_question_rows(tmp_path / "rows", 40, 160, 2)
    asked = ["tune", str(model), kind, "--data", str(rows), "--steps", "2", "--batch", "4", "--no-rehearsal"]
    asked += ["--out", str(tmp_path / "out")]
    bare = CliRunner().invoke(app, [*asked, "--no-report"], env={"COLUMNS": "200"})
    folder = tmp_path / "out" / "model"
    assert bare.exit_code == 0 and not (folder / CARD).exists(), bare.output
    said = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert said.exit_code == 0, said.output
    assert "Before and after" in said.output and f"The card is {folder / CARD}" in said.output.replace("\n", "")
    card, numbers = (folder / CARD).read_text(), json.loads((folder / "report.json").read_text())
    assert (folder / "curves.png").read_bytes() == (tmp_path / "out" / kind[2:] / "curves.png").read_bytes()
    digest = hashlib.sha256(rows.read_bytes()).hexdigest()
    assert f"| rows.csv | {digest} |" in card and "(curves.png)" in card and "| base | tiny |" in card
    assert ("on 4 bits" in card) == (kind == "--qlora") and "2 of 4 lessons" in card and "kangaroo chat" in card
    assert len(numbers["samples"]) == min(10, numbers["new"]["questions"]) and numbers["known"]["questions"] == 9
    first = numbers["samples"][0]
    assert first["question"] in card and first["right"] in card
    (folder / CARD).write_text("# By hand\n")
    again = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert again.exit_code == 0 and (folder / CARD).read_text() == "# By hand\n"
    assert is_ours((folder / OTHER_CARD).read_text())
