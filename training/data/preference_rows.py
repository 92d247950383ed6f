"""Read rows of preferences: pictures, a question, the better answer and the worse one, in the forms people publish."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.data.conversation_forms import QUESTION_FIELDS, read_conversation
from training.data.conversations import Conversation, Message, RowError
from training.data.pictures import DataError
from training.data.recognise import LOOKED_AT, ConversationRows
from training.data.records import open_records

CHOSEN, REJECTED = "chosen", "rejected"
OPENAI = ("input", "preferred_output", "non_preferred_output")

FORMS = """A file of preferences is one of these; pictures are paths that count from the file, or from --pictures.

  question, chosen and rejected (CSV, JSON lines, Parquet), and image where there is a picture
    image,question,chosen,rejected
    cat.jpg,What is it?,A cat.,A dog.
  messages, as trl has them (JSON lines, Parquet): `prompt`, and one answer each as `chosen` and `rejected`
    {"image": "cat.jpg", "prompt": [{"role": "user", "content": "What is it?"}],
     "chosen": [{"role": "assistant", "content": "A cat."}], "rejected": [{"role": "assistant", "content": "A dog."}]}
  preferences as OpenAI takes them (JSON lines): `input.messages`, `preferred_output`, `non_preferred_output`
    {"input": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.jpg"}},
     {"type": "text", "text": "What is it?"}]}]}, "preferred_output": [{"role": "assistant", "content": "A cat."}],
     "non_preferred_output": [{"role": "assistant", "content": "A dog."}]}"""


@dataclass(frozen=True)
class PreferenceRows(ConversationRows):
    """Rows of one source as conversations that end in the better answer; `others` of each holds the worse one."""

    def __getitem__(self, index: int) -> Conversation:
        """Row `index`. Raises RowError naming the field that is wrong."""
        return read_preference(self.records[index])


def open_preferences(source: Path | str, split: str = "train") -> PreferenceRows:
    """The rows of a file, a folder of a dataset, or a dataset of the hub. Raises DataError when no form fits."""
    records = open_records(source, split)
    first: Mapping[str, Any] = {}
    for index in range(min(LOOKED_AT, len(records))):
        try:
            first = records[index]
        except RowError:
            continue
        if _fields_of(first) is not None:
            path = Path(source).expanduser()
            base = (path if path.is_dir() else path.parent) if path.exists() else None
            return PreferenceRows(records, "preferences", base)
    named = ", ".join(first) or "none"
    raise DataError(
        f"{records.name} is not recognised as preferences.\n\nFound: {records.kind}, {len(records):,} rows with the "
        f"fields {named[:300]}\n\n{FORMS}"
    )


def read_preference(fields: Mapping[str, Any]) -> Conversation:
    """The conversation with the better answer at its end; the earlier answers are read, not learned.

    Raises RowError where there is no question, no answer, two equal answers, or the row has none of the forms.
    """
    names = _fields_of(fields)
    if names is None:
        wrong = f"the row has the fields {', '.join(map(repr, list(fields)[:8])) or 'none'}"
        raise RowError("not a conversation", "row", wrong, "give it a question, chosen and rejected")
    prompt, better, worse = names
    rejected = _answer(fields, worse)
    conversation = _asked(fields, prompt, better, _answer(fields, better))
    *before, last = conversation.messages
    if last.text.strip() == rejected.strip():
        wrong = f"it is the same answer as {better}: {rejected.strip()!r:.60}"
        raise RowError("nothing supervised", worse, wrong, "write an answer that is worse, or take out the row")
    read = tuple(replace(message, supervised=False) if message.role == "assistant" else message for message in before)
    return Conversation((*read, last), {REJECTED: Message("assistant", (rejected,), worse)}, conversation.remarks)


def rejected_of(conversation: Conversation) -> Conversation:
    """The same conversation with the worse answer at its end."""
    return Conversation((*conversation.messages[:-1], conversation.others[REJECTED]))


def _fields_of(fields: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The names of the fields with question, better and worse answer; None where none of the forms fits."""
    if all(name in fields for name in OPENAI):
        return OPENAI
    by_name = {name.strip().lower(): name for name in fields}
    asked = next((by_name[name] for name in QUESTION_FIELDS if name in by_name), None)
    if asked is None or CHOSEN not in by_name or REJECTED not in by_name:
        return None
    return asked, by_name[CHOSEN], by_name[REJECTED]


def _answer(fields: Mapping[str, Any], name: str) -> str:
    """The text of an answer: a text itself, or the last of some messages."""
    said = _listed(fields[name])
    if isinstance(said, Sequence) and not isinstance(said, str):
        if not said or not isinstance(said[-1], Mapping) or said[-1].get("role") != "assistant":
            raise RowError("wrong order", name, "it does not end in an answer of the assistant", "let it end in one")
        said = said[-1].get("content")
        if isinstance(said, Sequence) and not isinstance(said, str):
            texts = [part.get("text") if isinstance(part, Mapping) else part for part in said]
            written = [text for text in texts if isinstance(text, str)]
            said = "".join(written) if len(written) == len(texts) else None
    if isinstance(said, int | float) and not isinstance(said, bool):
        said = str(said)
    if not isinstance(said, str) or not said.strip():
        raise RowError("empty message", name, f"it holds no answer, but {fields[name]!r:.60}", "write the answer")
    return said


def _listed(cell: Any) -> Any:
    """Messages that stand in a cell of a CSV as JSON, and everything else as it is."""
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _asked(fields: Mapping[str, Any], prompt: str, better: str, chosen: str) -> Conversation:
    """The question with its pictures, and `chosen` behind it, read as a lesson would be."""
    asked = fields["input"].get("messages") if prompt == "input" and isinstance(fields["input"], Mapping) else None
    asked = _listed(fields[prompt]) if asked is None else asked
    others = {name: cell for name, cell in fields.items() if name not in (prompt, better)}
    if isinstance(asked, list):
        told: dict[str, Any] = others | {"messages": [*asked, {"role": "assistant", "content": chosen}]}
        renamed = {f"messages[{len(asked)}]": better, "messages[": f"{prompt}["}
    else:
        told = others | {"question": asked, "answer": chosen}
        renamed = {"question": prompt, "answer": better}
    try:
        return read_conversation(told)
    except RowError as error:
        fault = error.fault
        for ours, theirs in renamed.items():
            if fault.field.startswith(ours):
                field = theirs + fault.field.removeprefix(ours)
                raise RowError(fault.kind, field, fault.wrong, fault.way_out) from error
        raise
