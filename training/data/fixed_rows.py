"""Write the rows that can be taught in one canonical form, and the others beside them with what is wrong."""

import base64
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from training.data.conversations import Conversation, Message, PictureReference, RowError
from training.data.data_check import Check
from training.data.picture_references import PictureFinder
from training.data.pictures import DataError
from training.data.recognise import ConversationRows


def refused_file(out: Path) -> Path:
    """Where the rows go that are left out of `out`."""
    return out.with_name(f"{out.stem}.refused.jsonl")


def write_fixed(out: Path, check: Check, rows: ConversationRows, finder: PictureFinder) -> tuple[int, int]:
    """Write the good rows to `out` as OpenAI messages, a row a line, and the refused ones to `refused_file(out)`.

    Fields that are no messages and no pictures, such as an id, are kept. Paths of pictures count from the folder of
    `out`; pictures that were embedded stay so, as data URLs. Returns how many rows went where. Raises DataError when
    `out` is not written because it is the file that is read, or already there.
    """
    if out.exists():
        raise DataError(f"{out} is already there; name a new file with --fixed, or remove it first")
    good = set(check.good)
    with _whole_file(out) as file:
        for row in check.good:
            file.write(_line(canonical(rows[row - 1], finder, out.parent)))
    refused = [row for row in range(1, len(rows) + 1) if row not in good]
    if refused:
        reasons: dict[int, list[str]] = {row: [] for row in refused}
        for finding in check.findings:
            if finding.fault.refuses:
                reasons[finding.row].append(f"{finding.fault.field}: {finding.fault.wrong}")
        with _whole_file(refused_file(out)) as file:
            for row in refused:
                file.write(_line({"row": row, "wrong": reasons[row], "fields": _fields(rows, row - 1)}))
    return len(good), len(refused)


def canonical(conversation: Conversation, finder: PictureFinder, folder: Path) -> dict[str, Any]:
    """The row in the form of OpenAI's messages, with paths that count from `folder`."""
    return conversation.others | {"messages": [_message(m, finder, folder) for m in conversation.messages]}


def _message(message: Message, finder: PictureFinder, folder: Path) -> dict[str, Any]:
    parts = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": _where(part, finder, folder)}}
        for part in message.parts
    ]
    said: dict[str, Any] = {"role": message.role, "content": parts}
    return said if message.supervised else said | {"weight": 0}


def _where(picture: PictureReference, finder: PictureFinder, folder: Path) -> str:
    if picture.content is not None:
        with Image.open(io.BytesIO(picture.content)) as image:
            kind = image.get_format_mimetype()
        return f"data:{kind};base64," + base64.b64encode(picture.content).decode("ascii")
    where = picture.where or ""
    if where.startswith("data:") or where.lower().startswith("https://"):
        return where
    return os.path.relpath(finder.path(where).absolute(), folder.absolute())


def _fields(rows: ConversationRows, index: int) -> Any:
    try:
        return rows.records[index]
    except RowError:
        return None  # what cannot be read cannot be copied; `row` says where it stands


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=_as_text).encode(errors="backslashreplace").decode() + "\n"


def _as_text(value: Any) -> str:
    """What JSON has no form for: bytes as base64, the rest (times, decimals) as Python prints it."""
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else str(value)


@contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A file that appears under its name once all of it is written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
