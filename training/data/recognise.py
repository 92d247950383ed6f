"""Recognise what form conversation data is in, or say what was found and what each form needs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.conversation_forms import form_of, read_conversation
from training.data.conversations import Conversation, RowError
from training.data.pictures import DataError
from training.data.records import CsvRecords, Records, open_records

LOOKED_AT = 100  # rows that decide what form the data is in

FORMS = """A file of conversations is one of these; pictures are paths that count from the file, or from --pictures.

  LLaVA (JSON list or lines): `conversations` with from and value, `image` a path or a list, <image> where it stands
    {"id": "1", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
     {"from": "gpt", "value": "A cat."}]}
  ShareGPT (JSON list or lines): the same, with `images`
    {"images": ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image><image>Which is red?"}, ...]}
  messages (JSON lines, as OpenAI's; Parquet, datasets): `messages` with role and content, in parts or with `image(s)`
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.jpg"}},
     {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}
  question and answer (CSV, JSON lines, Parquet): columns question and answer, and image where there is a picture
    image,question,answer
    cat.jpg,What is it?,A cat.
  images and texts (datasets such as the Cauldron and FineVision): `images`, and `texts` with user and assistant"""


@dataclass(frozen=True)
class ConversationRows:
    """Rows of one source, each read when it is asked for."""

    records: Records
    form: str  # what people call it
    base: Path | None  # the folder that relative paths of pictures count from; None for a dataset

    @property
    def name(self) -> str:
        """What errors call the source."""
        return self.records.name

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Conversation:
        """The conversation of row `index`. Raises RowError."""
        return read_conversation(self.records[index])

    def place(self, index: int) -> str:
        """Where row `index` is found, in words."""
        return self.records.place(index)


def recognise(source: Path | str, split: str = "train") -> ConversationRows:
    """The rows of `source`, whatever form it is in: a file, a folder of a dataset, or a name on the hub.

    Raises DataError that says what was found, what each form needs, and an example, where none fits.
    """
    records = open_records(source, split)
    forms: Counter[str] = Counter()
    first: Mapping[str, Any] | None = None
    fault: RowError | None = None
    for index in range(min(LOOKED_AT, len(records))):
        try:
            fields = records[index]
        except RowError as error:
            fault = fault or error
            continue
        first = fields if first is None else first
        form = form_of(fields)
        if form is not None:
            forms[form] += 1
    if not forms:
        raise DataError(_report(records, first, fault))
    path = Path(source).expanduser()
    base = (path if path.is_dir() else path.parent) if path.exists() else None
    return ConversationRows(records, " and ".join(form for form, _ in forms.most_common()), base)


def _report(records: Records, first: Mapping[str, Any] | None, fault: RowError | None) -> str:
    lines = [f"{records.name} is not recognised as conversations.", ""]
    lines.append(f"Found: {records.kind}, {len(records):,} rows.")
    if isinstance(records, CsvRecords):
        lines.append(f"Its header: {', '.join(records.header)[:300]}")
    elif first is not None:
        lines.append(
            "Its first row: " + ", ".join(f"{name} ({_shape(cell)})" for name, cell in list(first.items())[:12])
        )
    elif fault is not None:
        lines.append(f"{records.place(0)}: {fault}")
    names = {name.strip().lower() for name in first or ()}
    if names & {"caption", "captions"}:
        lines.append("It holds captions: name it as `captions:` (or `shard:`) in a recipe, or add question and answer.")
    return "\n".join([*lines, "", FORMS])


def _shape(cell: Any) -> str:
    if isinstance(cell, list):
        return f"{len(cell)} of {_shape(cell[0])}" if cell else "an empty list"
    if isinstance(cell, dict):
        return "fields " + "/".join(map(str, list(cell)[:5]))
    return f"{cell!r:.40}" if isinstance(cell, str | int | float | bool) else type(cell).__name__
