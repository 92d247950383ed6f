"""Conversation data in every published form: recognised without a flag, read as it is meant, refused by name."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pictures

from training.data.conversation_forms import read_conversation
from training.data.conversations import Conversation, PictureReference, RowError
from training.data.picture_references import PictureFinder
from training.data.pictures import DataError
from training.data.recognise import recognise

# Rows as their authors publish them, shortened.
LLAVA_ROW = {
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
        {"from": "gpt", "value": "The bus in the image is white and red."},
        {"from": "human", "value": "What feature can be seen on the back of the bus?"},
        {"from": "gpt", "value": "The back of the bus features an advertisement."},
    ],
}
SHAREGPT4V_ROW = {
    "id": "sa_5060",
    "image": "sam/images/sa_5060.jpg",
    "conversations": [
        {"from": "human", "value": "What do you see happening in this image?\n<image>"},
        {"from": "gpt", "value": "In the center of the image, a vibrant blue lunch tray holds four containers."},
    ],
}
OPENAI_ROW = {
    "messages": [
        {"role": "system", "content": "You are an assistant that identifies uncommon cheeses."},
        {"role": "user", "content": "What is this cheese?"},
        {
            "role": "user",
            "content": [
                {
                    "type": "image_url",
                    "image_url": {"url": "https://upload.example.org/Danbo_Cheese.jpg", "detail": "low"},
                }
            ],
        },
        {"role": "assistant", "content": "Danbo"},
    ]
}
LLAMA_FACTORY_ROW = {
    "messages": [
        {"role": "user", "content": "<image>Who are they?"},
        {"role": "assistant", "content": "They're Kane and Gretzka from Bayern Munich."},
        {"role": "user", "content": "<image>And here?"},
        {"role": "assistant", "content": "One of them celebrates."},
    ],
    "images": ["mllm_demo_data/1.jpg", "mllm_demo_data/2.jpg"],
}
TRL_ROW = {
    "images": ["a.png"],
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
}
CAULDRON_ROW = {
    "images": ["a.png", "b.png"],
    "texts": [
        {"user": "Which is red?", "assistant": "The first.", "source": "nlvr2"},
        {"user": "And blue?", "assistant": "The second.", "source": "nlvr2"},
    ],
}


def encoded(colour: str = "red", kind: str = "PNG") -> bytes:
    """A small picture of one colour, as a file."""
    file = io.BytesIO()
    Pictures.new("RGB", (32, 24), colour).save(file, kind)
    return file.getvalue()


def data_url(colour: str = "red") -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(colour)).decode()


def said(conversation: Conversation) -> list[tuple[str, list[str]]]:
    """Roles and parts, a picture as what its row calls it in angle brackets."""
    return [
        (m.role, [part if isinstance(part, str) else f"<{part}>" for part in m.parts]) for m in conversation.messages
    ]


def refused(row: dict[str, Any]) -> tuple[str, str]:
    """The kind and the field of what is wrong with `row`."""
    with pytest.raises(RowError) as error:
        read_conversation(row)
    return error.value.fault.kind, error.value.fault.field


def test_a_llava_row_is_a_dialogue_with_its_picture_before_the_first_question() -> None:
    conversation = read_conversation(LLAVA_ROW)
    assert said(conversation) == [
        ("user", ["<coco/train2017/000000033471.jpg>", "What are the colors of the bus in the image?"]),
        ("assistant", ["The bus in the image is white and red."]),
        ("user", ["What feature can be seen on the back of the bus?"]),
        ("assistant", ["The back of the bus features an advertisement."]),
    ]
    assert conversation.turns == 2
    assert conversation.others == {"id": "000000033471"}
    assert conversation.chat_messages()[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What are the colors of the bus in the image?"},
    ]


def test_a_sharegpt4v_row_keeps_its_picture_behind_the_question() -> None:
    assert said(read_conversation(SHAREGPT4V_ROW))[0] == (
        "user",
        ["What do you see happening in this image?", "<sam/images/sa_5060.jpg>"],
    )


def test_an_openai_row_has_a_system_message_and_its_two_questions_put_together() -> None:
    conversation = read_conversation(OPENAI_ROW)
    assert said(conversation) == [
        ("system", ["You are an assistant that identifies uncommon cheeses."]),
        ("user", ["What is this cheese?", "<https://upload.example.org/Danbo_Cheese.jpg>"]),
        ("assistant", ["Danbo"]),
    ]
    assert [(remark.kind, remark.field) for remark in conversation.remarks] == [
        ("questions put together", "messages[2].content")
    ]


def test_marks_in_plain_messages_are_places_where_the_row_lists_pictures() -> None:
    assert [parts for role, parts in said(read_conversation(LLAMA_FACTORY_ROW)) if role == "user"] == [
        ["<mllm_demo_data/1.jpg>", "Who are they?"],
        ["<mllm_demo_data/2.jpg>", "And here?"],
    ]


def test_places_without_a_name_take_the_pictures_that_the_row_lists() -> None:
    assert said(read_conversation(TRL_ROW))[0] == ("user", ["<a.png>", "What is it?"])
    unmarked: dict[str, Any] = {
        "images": ["a.png", "b.png"],
        "messages": [{"role": "user", "content": "Which is red?"}],
    }
    unmarked["messages"].append({"role": "assistant", "content": "The first."})
    assert said(read_conversation(unmarked))[0] == ("user", ["<a.png>", "<b.png>", "Which is red?"])
    assert said(read_conversation(CAULDRON_ROW))[0] == ("user", ["<a.png>", "<b.png>", "Which is red?"])
    assert read_conversation(CAULDRON_ROW).turns == 2


def test_pictures_stay_where_they_stand_between_words() -> None:
    row = {
        "images": ["a.png", "b.png"],
        "system": "Compare.",
        "conversations": [
            {"from": "human", "value": "First: <image>\nSecond: <image>\nWhich is red?"},
            {"from": "gpt", "value": "The first."},
        ],
    }
    assert said(read_conversation(row))[:2] == [
        ("system", ["Compare."]),
        ("user", ["First: ", "<a.png>", "\nSecond: ", "<b.png>", "\nWhich is red?"]),
    ]


def test_a_typed_mark_is_only_words() -> None:
    """In parts, in a row that lists no pictures, and in an answer, <image> is what somebody typed."""
    parts = [{"type": "text", "text": "Is <image> a tag?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes, <image> is."}]
    }
    assert said(read_conversation(row)) == [
        ("user", ["Is <image> a tag?", "<a.png>"]),
        ("assistant", ["Yes, <image> is."]),
    ]
    row = {"messages": [{"role": "user", "content": "Is <image> a tag?"}, {"role": "assistant", "content": "Yes."}]}
    assert read_conversation(row).pictures == ()
    row = {"Question": "Is <image> a tag?", " ANSWER ": "Yes.", "Image": "a.png"}
    assert said(read_conversation(row))[0] == ("user", ["<a.png>", "Is <image> a tag?"])


def test_an_answer_of_weight_zero_is_not_learned() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "content": "Yes.", "weight": 1},
        ]
    }
    assert [message.supervised for message in read_conversation(row).messages] == [True, False, True, True]
    assert [message.get("supervised", True) for message in read_conversation(row).chat_messages()][1] is False
    row["messages"] = row["messages"][:2]
    assert refused(row) == ("nothing supervised", "messages[1].content")


def turns(*values: tuple[str, str], **others: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": value} for who, value in values], **others}


@pytest.mark.parametrize(
    ("row", "kind", "field"),
    [
        (turns(("human", "Hi <image>"), ("gpt", "A cat.")), "picture count", "row"),
        (turns(("human", "Hi"), ("gpt", "A cat."), image="a.jpg"), "picture count", "image"),
        (turns(("human", "<image><image> Hi"), ("gpt", "A cat."), image="a.jpg"), "picture count", "image"),
        (turns(("human", "Hi"), ("gpt", "<image>"), images=["a.jpg"]), "picture count", "images"),
        (turns(("human", "Hi"), ("robot", "A cat.")), "unknown role", "conversations[1].from"),
        (turns(("gpt", "A cat."), ("human", "Hi")), "wrong order", "conversations[0].value"),
        (turns(("human", "Hi"), ("gpt", "A."), ("gpt", "B.")), "wrong order", "conversations[2].value"),
        (turns(("human", "Hi"), ("gpt", "A."), ("human", "B?")), "wrong order", "conversations[2].value"),
        (turns(("human", "Hi"), ("gpt", "A."), ("system", "B.")), "wrong order", "conversations[2].value"),
        (turns(("human", "Hi")), "nothing supervised", "conversations[0].value"),
        (turns(("system", "Hi")), "nothing supervised", "conversations[0].value"),
        (turns(("human", "Hi"), ("gpt", " \n")), "empty message", "conversations[1].value"),
        (turns(("human", ""), ("gpt", "A.")), "empty message", "conversations[0].value"),
        (turns(), "empty message", "messages"),
        (turns(("human", "Hi \ud800"), ("gpt", "A.")), "broken text", "conversations[0].value"),
        (turns(("human", "<image>"), ("gpt", "A."), image=[None]), "missing picture", "image[0]"),
        (turns(("human", "<image>"), ("gpt", "A."), image=7), "missing picture", "image"),
        ({"conversations": "Hi"}, "not a conversation", "conversations"),
        ({"conversations": ["Hi"]}, "not a conversation", "conversations[0]"),
        ({"messages": [{"role": "user", "content": 7}]}, "not a conversation", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "not a conversation", None),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "picture count", "messages[0].content[0]"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "unknown role", "messages[0].role"),
        ({"messages": [{"role": None, "content": "7"}]}, "unknown role", "messages[0].role"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "not a conversation",
            "messages[0]",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image_url", "image_url": "a.png"}]}]},
            "not a conversation",
            "messages[0].content",
        ),
        ({"question": "What?", "answer": ""}, "empty message", "answer"),
        ({"question": " ", "answer": "A cat.", "image": "a.png"}, "empty message", "question"),
        ({"question": ["What?"], "answer": "A cat."}, "not a conversation", "question"),
        ({"caption": "A cat."}, "not a conversation", "row"),
    ],
)
def test_a_row_that_cannot_be_taught_is_refused_by_kind_and_field(row: dict[str, Any], kind: str, field: str) -> None:
    found = refused(row)
    assert found[0] == kind
    assert field is None or found[1] == field


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("row", "form"), [(LLAVA_ROW, "LLaVA"), (LLAMA_FACTORY_ROW, "messages"), (CAULDRON_ROW, "images and texts")]
)
def test_a_json_list_is_recognised(tmp_path: Path, row: dict[str, Any], form: str, indent: int | None) -> None:
    file = tmp_path / "data.anything"
    strange = row | {"note": "naïve 東京 🦘 ]},{["}
    file.write_text(json.dumps([strange, row, strange], indent=indent, ensure_ascii=False), encoding="utf-8-sig")
    rows = recognise(file)
    assert (rows.form, rows.records.kind, len(rows)) == (form, "a JSON list", 3)
    assert [rows.records[i] for i in range(3)] == [strange, row, strange]
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    assert rows.place(1).startswith("row 2 (line ")
    assert "{" in lines[int(rows.place(1).split("line ")[1].rstrip(")")) - 1]


def test_json_lines_are_recognised_with_mixed_rows_blank_lines_and_any_name(tmp_path: Path) -> None:
    """Text only, many pictures, a system message, and several forms, in one file."""
    sharegpt = turns(("human", "<image><image>Which?"), ("gpt", "The first."), images=["a.png", "b.png"])
    text_only = turns(("human", "Hello"), ("gpt", "Hi there."))
    rows_in = [sharegpt, text_only, OPENAI_ROW, {"question": "2 + 2?", "answer": 4}]
    file = tmp_path / "data.txt"
    content = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows_in)
    file.write_bytes(content.encode())
    rows = recognise(str(file))
    assert [len(rows[i].pictures) for i in range(4)] == [2, 0, 1, 0]
    assert rows.form.split(" and ")[0] in ("ShareGPT", "LLaVA", "messages", "question")
    assert rows.place(2) == "row 3 (line 5)"
    assert said(rows[3])[1] == ("assistant", ["4"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_questions_is_recognised_whatever_its_header(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "data.csv"
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(["ANSWER", "note", " Image", "Question "])
        writer.writerow(["A cat, or two;\tnobody knows", "x", "a.png", 'What "is" it,\nreally?'])
        writer.writerow(["Four.", "", "", "2 + 2?"])
    rows = recognise(file)
    assert (rows.form, rows.records.kind) == ("question and answer", "CSV")
    assert said(rows[0]) == [
        ("user", ["<a.png>", 'What "is" it,\nreally?']),
        ("assistant", ["A cat, or two;\tnobody knows"]),
    ]
    assert rows[0].others == {"note": "x"}
    assert rows[1].pictures == ()


def test_parquet_with_pictures_inside_is_recognised(tmp_path: Path) -> None:
    records = [
        {"image": {"bytes": encoded(colour), "path": None}, "question": "What colour?", "answer": colour}
        for colour in ("red", "blue")
    ]
    file = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), file)
    rows = recognise(file)
    assert (rows.form, rows.records.kind, len(rows)) == ("question and answer", "Parquet", 2)
    assert rows[1].pictures[0].content == encoded("blue")


def test_a_saved_dataset_with_images_and_messages_is_recognised(tmp_path: Path) -> None:
    """Pictures of the datasets library, in a list and inside the parts of messages, are not decoded on the way."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"images": List(Image()), "messages": List({"role": Value("string"), "content": List(part)})})
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    row = {"images": [{"bytes": encoded(), "path": None}], "messages": messages}
    table = Dataset.from_dict({"images": [row["images"]] * 2, "messages": [messages] * 2}, features=features)
    DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "saved")
    rows = recognise(tmp_path / "saved")
    assert (rows.form, len(rows), len(recognise(tmp_path / "saved", "test"))) == ("messages", 2, 1)
    assert rows[0].pictures[0].content == encoded()
    assert said(rows[0])[1] == ("assistant", ["Red."])
    with pytest.raises(DataError, match="no split dev"):
        recognise(tmp_path / "saved", "dev")


def test_what_is_not_recognised_is_told_with_what_each_form_needs(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"file_name": "a.png", "caption": "A cat."}])
    with pytest.raises(DataError) as error:
        recognise(file)
    told = str(error.value)
    assert "JSON lines, 1 rows" in told and "caption ('A cat.')" in told and "`captions:`" in told
    for form in ("LLaVA", "ShareGPT", "messages", "question and answer"):
        assert form in told
    assert '"from": "human"' in told and "image,question,answer" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"\x1f\x8b\x08abc", "unpack it"),
        ("[]".encode("utf-16"), "UTF-16"),
        (b"\x00\x01\x02", "no text"),
        (b"[]", "holds no rows"),
        (b'[{"a": 1}, {"b" 2}]', "line 1, column 17"),
        (b'[{"a": 1}\n {"b": 2}]', "line 2"),
        (b'[{"a": 1}] x', "behind the list"),
        (b'[{"a": "\xff"}]', "not UTF-8"),
        (b"question,answer\n", "no rows"),
        (b'question,answer\n"open,quote\n', "not CSV"),
        (b'{\n "data": [1, 2]\n}', "not recognised"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_why(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(DataError, match=told):
        recognise(tmp_path / "data")


def test_a_missing_file_is_no_name_on_the_hub(tmp_path: Path) -> None:
    for source in (tmp_path / "no.json", str(tmp_path / "no.json"), "no.jsonl", "./no"):
        with pytest.raises(DataError, match="there is no file"):
            recognise(source)


def test_broken_lines_are_refused_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    good = json.dumps(turns(("human", "Hi"), ("gpt", "Hi.")))
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    file.write_bytes("\n".join([good, good[:-4], "[1]", "null", deep]).encode() + b'\n{"a": "\xff"}\n')
    rows = recognise(file)
    found = []
    for index in range(len(rows)):
        try:
            rows[index]
            found.append("good")
        except RowError as error:
            found.append(error.fault.kind)
    assert found == ["good", "not JSON", "not a conversation", "not a conversation", "not JSON", "not JSON"]


def test_pictures_are_found_beside_the_file_in_a_folder_by_path_and_in_the_row(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a b.png").write_bytes(encoded())
    beside, below = PictureFinder(tmp_path), PictureFinder(tmp_path / "elsewhere", tmp_path / "photos")
    there = tmp_path / "photos" / "a b.png"
    assert beside.content(PictureReference("image", "photos/a b.png")) == there
    assert below.content(PictureReference("image", "a b.png")) == there
    assert below.content(PictureReference("image", str(there))) == there
    assert below.content(PictureReference("image", there.as_uri())) == there
    assert beside.content(PictureReference("image", data_url())) == encoded()
    assert beside.content(PictureReference("image", None, b"bytes")) == b"bytes"


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("no.png", "missing picture"),
        ("photos", "missing picture"),
        ("a\0b.png", "missing picture"),
        ("x" * 5000, "missing picture"),
        ("data:image/png;base64,@@", "damaged picture"),
        ("data:text/html,hello", "damaged picture"),
        ("https://example.org/a.png", "remote picture"),
        ("http://example.org/a.png", "remote picture"),
    ],
)
def test_a_picture_that_cannot_be_had_is_refused_by_kind(tmp_path: Path, where: str, kind: str) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(RowError) as error:
        PictureFinder(tmp_path).content(PictureReference("image", where))
    assert error.value.fault.kind == kind
