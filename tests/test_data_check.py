"""The check of conversation data: every fault by its exact row, what stops training, and the good rows written out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import LlavaProcessor
from typer.testing import CliRunner, Result

from assistant.chat import encode_conversation
from tests.test_conversations import OPENAI_ROW, data_url, encoded, write_lines
from tests.test_conversations_templates import LLAVA
from tests.tiny import make_tiny_llava
from training.data.check_terminal import notes, printable
from training.data.conversation_lessons import ConversationLessons
from training.data.data_check import Check, check_data, histogram, shared_pictures
from training.data.lesson_judge import LessonJudge, judge_for
from training.data.picture_references import PictureFinder
from training.data.recognise import recognise
from ui.command_line import app

ROWS = 1000
COLOURS = ("red", "green", "blue", "yellow", "black", "white")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def judge(model: Path) -> LessonJudge:
    return judge_for(str(model), longest=300)[0]


def good_row(number: int) -> Row:
    """A LLaVA row about one of six pictures; one row in three is a dialogue, one in ten has no picture."""
    turns = [("human", f"What colour is picture {number}?"), ("gpt", f"It is {COLOURS[number % 6]}, number {number}.")]
    if number % 3 == 0:
        turns += [("human", "Is that all?"), ("gpt", "Yes.")]
    row: Row = {"id": f"id-{number}"}
    if number % 10:
        row["image"] = f"{COLOURS[number % 6]}.png"
        turns[0] = ("human", "<image>\n" + turns[0][1])
    row["conversations"] = [{"from": who, "value": value} for who, value in turns]
    return row


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(encoded(colour))
    return tmp_path


def set_value(row: Row, turn: int, value: str) -> None:
    row["conversations"][turn]["value"] = value


def with_twelve_faults(folder: Path) -> tuple[list[str], dict[int, str]]:
    """The lines of a 1,000-row file with twelve different faults, and the kind of fault of each bad row (from 1)."""
    rows = [good_row(number) for number in range(1, ROWS + 1)]
    faults = {
        17: "missing picture",
        111: "damaged picture",  # cut off in the middle
        222: "damaged picture",  # no picture at all
        303: "not JSON",
        344: "unknown role",
        405: "wrong order",
        466: "empty message",
        527: "nothing supervised",
        588: "too long",
        649: "picture count",
        777: "not a conversation",
        999: "broken text",
    }
    (folder / "cut.png").write_bytes(encoded()[:-30])
    (folder / "page.png").write_text("<html>not found</html>")
    rows[16]["image"] = "nowhere.png"
    rows[110]["image"], rows[221]["image"] = "cut.png", "page.png"
    rows[343]["conversations"][1]["from"] = "robot"
    rows[404]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    set_value(rows[465], 1, "  ")
    rows[526]["conversations"] = rows[526]["conversations"][:1]
    set_value(rows[587], 1, "again and again " * 200)
    set_value(rows[648], 0, "<image><image> Which?")
    rows[776]["conversations"] = "What is it? A cat."
    set_value(rows[998], 1, "half \ud83e of it")
    lines = [json.dumps(row) for row in rows]
    lines[302] = lines[302][:-9]
    return lines, faults


def checked(source: Path, judge: LessonJudge, pictures: Path | None = None) -> Check:
    rows = recognise(source)
    return check_data(rows, PictureFinder(rows.base, pictures), judge)


def test_each_of_twelve_faults_in_a_thousand_rows_is_found_with_its_exact_row(folder: Path, judge: LessonJudge) -> None:
    lines, faults = with_twelve_faults(folder)
    (folder / "data.jsonl").write_text("\n".join(lines))
    check = checked(folder / "data.jsonl", judge)
    assert {finding.row: finding.fault.kind for finding in check.findings} == faults
    assert len(check.findings) == 12
    assert all(finding.place == f"row {finding.row} (line {finding.row})" for finding in check.findings)
    assert all(finding.fault.wrong and finding.fault.way_out and finding.fault.field for finding in check.findings)
    assert check.good == [row for row in range(1, ROWS + 1) if row not in faults]
    assert (check.rows, check.refused) == (1000, 12)
    good = [good_row(row) for row in check.good]
    assert check.text_only == sum("image" not in row for row in good)
    assert check.dialogues == sum(len(row["conversations"]) == 4 for row in good)
    assert len(check.pictures_of) == 6
    assert check.stops(strict=False) and check.stops(strict=True)  # 12 in 1,000 are more than one in 100


def test_lengths_and_learned_tokens_are_those_of_training(folder: Path, judge: LessonJudge, model: Path) -> None:
    rows = [good_row(number) for number in range(1, 31)]
    check = checked(write_lines(folder / "data.jsonl", rows), judge)
    tokenizer = LlavaProcessor.from_pretrained(model).tokenizer
    lengths, supervised = [], 0
    for row in rows:
        messages = [
            {
                "role": {"human": "user", "gpt": "assistant"}[turn["from"]],
                "content": [{"type": "image"}] * turn["value"].count("<image>\n")
                + [{"type": "text", "text": turn["value"].removeprefix("<image>\n")}],
            }
            for turn in row["conversations"]
        ]
        encoded_row = encode_conversation(tokenizer, messages, 100)
        lengths.append(len(encoded_row.ids))
        supervised += sum(encoded_row.supervised)
    assert check.lengths == lengths
    assert check.supervised == supervised
    assert check.endless == 0
    bins = histogram(check)
    assert sum(count for _, _, count in bins) == 30
    assert [count for _, _, count in bins] == [sum(low <= n < high for n in lengths) for low, high, _ in bins]


def test_what_a_template_does_unexpectedly_is_told(folder: Path, judge: LessonJudge, model: Path) -> None:
    """Joey's and LLaVA's put pictures first; LLaVA's as it is published marks no end of an answer as learned."""
    rows = [good_row(1), good_row(2)]
    set_value(rows[1], 0, "What is this?\n<image>")
    check = checked(write_lines(folder / "data.jsonl", rows), judge)
    assert (check.moved, check.endless) == (1, 0)
    assert ["behind words" in note for note in notes(check)] == [True]
    processor = LlavaProcessor.from_pretrained(model)
    processor.tokenizer.chat_template = LLAVA
    check = checked(folder / "data.jsonl", LessonJudge(processor, 300))
    assert (check.moved, check.endless) == (1, 2)
    assert "may not stop" in notes(check)[0]


def test_duplicates_are_told_by_content_and_taught(folder: Path, judge: LessonJudge) -> None:
    """The same bytes under another name and the same words: a duplicate. Another picture or another word: none."""
    (folder / "copy.png").write_bytes(encoded("red"))
    rows = [
        good_row(6),
        good_row(7),
        good_row(6) | {"id": "b", "image": "copy.png"},
        good_row(6) | {"image": "blue.png"},
    ]
    check = checked(write_lines(folder / "data.jsonl", rows), judge)
    assert [(found.row, found.fault.kind) for found in check.findings] == [(3, "duplicate")]
    assert "row 1" in check.findings[0].fault.wrong
    assert check.good == [1, 2, 3, 4]
    assert not check.stops(strict=True)


def test_a_picture_in_both_files_is_told(folder: Path, judge: LessonJudge) -> None:
    (folder / "copy.png").write_bytes(encoded("red"))
    trained = checked(write_lines(folder / "train.jsonl", [good_row(6), good_row(7)]), judge)
    rows = [good_row(8), good_row(9) | {"image": "copy.png"}]
    found = shared_pictures(trained, checked(write_lines(folder / "held.jsonl", rows), judge))
    assert [(finding.row, finding.fault.kind) for finding in found] == [(2, "in both files")]
    assert "row 1 (line 1)" in found[0].fault.wrong


def test_several_faults_of_one_row_are_all_told(folder: Path, judge: LessonJudge) -> None:
    row: Row = {
        "images": ["no.png", "red.png", "nowhere.png"],
        "conversations": [
            {"from": "human", "value": "<image>" * 3 + "What does </s> mean?"},
            {"from": "gpt", "value": "The end."},
        ],
    }
    check = checked(write_lines(folder / "data.jsonl", [good_row(1), row]), judge)
    assert [(found.fault.kind, found.fault.field) for found in check.findings] == [
        ("missing picture", "images[0]"),
        ("missing picture", "images[2]"),
        ("too long", "messages"),
    ]
    row["images"] = row["images"][1:2]
    set_value(row, 0, "<image>What does </s> mean?")
    check = checked(write_lines(folder / "data.jsonl", [good_row(1), row]), judge)
    assert [(f.fault.kind, f.fault.refuses) for f in check.findings] == [("typed special token", False)]


def test_a_picture_bomb_is_refused_before_it_is_unpacked(folder: Path, judge: LessonJudge) -> None:
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    check = checked(write_lines(folder / "data.jsonl", [good_row(1), good_row(1) | {"image": "bomb.png"}]), judge)
    assert [(found.row, found.fault.kind) for found in check.findings] == [(2, "damaged picture")]
    assert "too many pixels" in check.findings[0].fault.wrong


def test_training_skips_exactly_the_rows_that_the_check_refuses(folder: Path, judge: LessonJudge) -> None:
    lines, faults = with_twelve_faults(folder)
    (folder / "data.jsonl").write_text("\n".join(lines))
    rows = recognise(folder / "data.jsonl")
    lessons = ConversationLessons(rows, PictureFinder(rows.base), judge, damaged=0.02)
    generator = np.random.default_rng(0)
    names = [lessons.sample(index, generator).name for index in range(ROWS)]
    taught = {int(name.split()[1]) for name in names}
    assert taught == set(range(1, ROWS + 1)) - set(faults)
    assert names[16].startswith("row 18 ") and names[17].startswith("row 18 ")


# -- The command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kangaroo(model: Path) -> Iterator[Any]:
    def run(*arguments: object) -> Result:
        command = ["data", "check", *map(str, arguments), "--model", str(model)]
        return CliRunner().invoke(app, command, env={"COLUMNS": "200"})

    yield run


def test_the_command_says_what_it_found_and_fails_when_training_would_stop(folder: Path, kangaroo: Any) -> None:
    lines, _ = with_twelve_faults(folder)
    (folder / "data.jsonl").write_text("\n".join(lines))
    result = kangaroo(folder / "data.jsonl", "--longest", 300)
    assert result.exit_code == 1, result.output
    assert "Training would stop: 12 of 1,000 rows are refused" in result.output
    for told in ("row 303 (line 303)", "nowhere.png", "picture count", "robot", "tokens", "988"):
        assert told in result.output, told
    assert "It is green, number 1.</s>" in result.output  # a sample, with what is learned


def test_one_bad_row_in_a_hundred_is_a_warning_unless_strict(folder: Path, kangaroo: Any) -> None:
    rows = [good_row(number) for number in range(1, 101)]
    rows[50]["image"] = "nowhere.png"
    file = write_lines(folder / "data.jsonl", rows)
    lenient, strict = kangaroo(file), kangaroo(file, "--strict")
    assert (lenient.exit_code, strict.exit_code) == (0, 1)
    assert "Training would skip 1 row and go on" in lenient.output
    assert "row 51 (line 51)" in strict.output
    assert kangaroo(write_lines(folder / "good.jsonl", rows[:50]), "--strict").exit_code == 0


def test_the_good_rows_are_written_in_one_form_and_the_others_beside_them(folder: Path, kangaroo: Any) -> None:
    """Reading what was written gives the same lessons, whatever the form was, and no row is lost silently."""
    strange: list[Row] = [
        {"question": "2 + 2?", "answer": "Four.", "source": "maths"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url("red")}}]},
                {"role": "assistant", "content": "Hm.", "weight": 0},
                {"role": "user", "content": "And <image> as text?"},
                {"role": "assistant", "content": "Red."},
            ]
        },
        {
            "images": ["no.png"],
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A."}],
        },
    ]
    rows = [good_row(number) for number in range(1, 300)] + strange
    file = write_lines(folder / "data.jsonl", rows)
    with file.open("a") as lines:
        lines.write("{broken\n")
    (folder / "out").mkdir()
    result = kangaroo(file, "--fixed", folder / "out" / "good.jsonl")
    assert result.exit_code == 0, result.output
    assert "301 rows are in" in result.output and "2 were left out" in result.output
    before, after = recognise(file), recognise(folder / "out" / "good.jsonl")
    assert (after.form, len(after)) == ("messages", 301)
    finders = PictureFinder(before.base), PictureFinder(after.base)
    for index in range(301):
        old, new = before[index], after[index]
        assert old.chat_messages() == new.chat_messages()
        assert old.others == new.others
        contents = []
        for finder, conversation in zip(finders, (old, new), strict=True):
            found = [finder.content(picture) for picture in conversation.pictures]
            contents.append([each if isinstance(each, bytes) else each.read_bytes() for each in found])
        assert contents[0] == contents[1]
    refused = [json.loads(line) for line in (folder / "out" / "good.refused.jsonl").read_text().splitlines()]
    assert [line["row"] for line in refused] == [302, 303]
    assert refused[0]["fields"] == strange[2] and "no.png" in refused[0]["wrong"][0]
    assert kangaroo(folder / "out" / "good.jsonl", "--strict").exit_code == 0
    assert kangaroo(file, "--fixed", folder / "out" / "good.jsonl").exit_code == 1  # never written over


def test_two_files_are_compared(folder: Path, kangaroo: Any) -> None:
    train = write_lines(folder / "train.jsonl", [good_row(1)])
    held_out = write_lines(folder / "held.jsonl", [good_row(2), good_row(7)])
    result = kangaroo(train, held_out)
    assert result.exit_code == 0, result.output
    assert "in both files" in result.output and "row 2 (line 2)" in result.output


def test_pictures_on_the_web_are_not_fetched_unless_allowed(folder: Path, kangaroo: Any) -> None:
    result = kangaroo(write_lines(folder / "data.jsonl", [OPENAI_ROW]))
    assert result.exit_code == 1
    assert "remote picture" in result.output and "--allow-downloads" in result.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no.jsonl"], "there is no file no.jsonl"),
        (["{folder}/red.png"], "no text"),
        (["{folder}/data.jsonl", "--pictures", "{folder}/nowhere"], "no such folder"),
        (["{folder}/data.jsonl", "--page", "{folder}/no/page.html"], "folder that exists"),
        (["{folder}/data.jsonl", "--fixed", "{folder}/data.jsonl"], "new .jsonl file"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(folder: Path, kangaroo: Any, arguments: list[str], told: str) -> None:
    write_lines(folder / "data.jsonl", [good_row(1)])
    result = kangaroo(*(argument.format(folder=folder) for argument in arguments))
    assert result.exit_code == 1
    assert told in result.output and "Traceback" not in result.output


def test_words_of_the_data_neither_colour_nor_steer_the_terminal() -> None:
    shown = printable("[bold]x[/bold] \x1b[31m\x07\r\n\ttab \x9b naïve 東京 🦘")
    assert shown.plain == "[bold]x[/bold] \ufffd[31m\ufffd\ufffd\n\ttab \ufffd naïve 東京 🦘"
    assert shown.spans == []


def test_a_program_reads_what_a_person_reads(folder: Path, model: Path) -> None:
    lines, faults = with_twelve_faults(folder)
    (folder / "data.jsonl").write_text("\n".join(lines))
    arguments = ["data", "check", str(folder / "data.jsonl"), "--model", str(model), "--longest", "300", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    (source,) = report["sources"]
    assert report["stops"]
    assert source["stops"]
    assert (source["rows"], source["taught"]) == (ROWS, ROWS - len(faults))
    assert {found["row"]: found["kind"] for found in source["findings"] if found["refuses"]} == faults
    assert all(found["way_out"] and found["wrong"] and found["field"] for found in source["findings"])
    assert 0 < source["learned_tokens"] < source["tokens"]


@pytest.mark.parametrize("where", ["red.png", "https://example.org/red.png", "file:///etc/hostname", "../red.png"])
def test_data_of_strangers_opens_no_file(folder: Path, judge: LessonJudge, where: str) -> None:
    rows = []
    for url in (data_url(), where):
        asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "Red."}]})
    source = write_lines(folder / "data.jsonl", rows)
    opened = recognise(source)
    check = check_data(opened, PictureFinder(opened.base, paths=False), judge)
    assert [(finding.row, finding.fault.kind) for finding in check.findings] == [(2, "missing picture")]
    assert "data URL" in check.findings[0].fault.wrong
