"""Read one row of conversation data in any of the forms that people publish: turns, messages, question and answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from assistant.chat import IMAGE_TOKEN
from training.data.conversations import (
    Conversation,
    Message,
    PictureReference,
    Role,
    RowError,
    check_order,
    conversation_of,
)

TURN_FIELDS = ("conversations", "conversation", "messages")
PICTURE_FIELDS = ("images", "image", "picture", "picture_path", "image_path", "file_name", "file")
QUESTION_FIELDS = ("question", "prompt", "instruction")
ANSWER_FIELDS = ("answer", "response", "output")
TEXTS_FIELD = "texts"
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
MEND_COUNT = f"write {IMAGE_TOKEN} once for each picture, where it belongs, or mend the list of pictures"


@dataclass
class Pictures:
    """The pictures that a row lists beside its messages, handed out in their order."""

    name: str | None  # the field that lists them; None where the row has none
    listed: list[PictureReference] = field(default_factory=list)
    used: int = 0

    def next(self) -> PictureReference | None:
        """The next one, or None when all are used; how often it was asked is counted all the same."""
        self.used += 1
        return self.listed[self.used - 1] if self.used <= len(self.listed) else None


def form_of(fields: Mapping[str, Any]) -> str | None:
    """What people call the form of a row with these fields, or None when none of ours fits."""
    turns = _turn_field(fields)
    if turns is not None:
        first = next((turn for turn in fields[turns] if isinstance(turn, Mapping)), {})
        if "from" in first:
            return "ShareGPT" if "images" in fields else "LLaVA"
        return "messages"
    if isinstance(fields.get(TEXTS_FIELD), list):
        return "images and texts"
    names = {name.strip().lower() for name in fields}
    if names & set(QUESTION_FIELDS) and names & set(ANSWER_FIELDS):
        return "question and answer"
    return None


def read_conversation(fields: Mapping[str, Any]) -> Conversation:
    """The conversation of a row. Raises RowError naming the field that is wrong."""
    turns = _turn_field(fields)
    if turns is not None:
        return _from_turns(fields, turns)
    if isinstance(fields.get(TEXTS_FIELD), list):
        return _from_texts(fields)
    if form_of(fields) is not None:
        return _from_question(fields)
    named = ", ".join(map(repr, list(fields)[:8])) or "none"
    for name in TURN_FIELDS:
        if name in fields:
            wrong = f"it is no list of messages, but {fields[name]!r:.60}"
            raise RowError("not a conversation", name, wrong, "write a list of messages")
    wrong = f"the row has the fields {named}"
    raise RowError("not a conversation", "row", wrong, "give it conversations, messages, or question and answer")


def _turn_field(fields: Mapping[str, Any]) -> str | None:
    return next((name for name in TURN_FIELDS if isinstance(fields.get(name), list)), None)


def _from_turns(fields: Mapping[str, Any], turns: str) -> Conversation:
    pictures = _listed(fields, PICTURE_FIELDS[:2])
    messages = [
        _message(entry, f"{turns}[{number}]", pictures, _reads_marks(entry, pictures))
        for number, entry in enumerate(fields[turns])
    ]
    system = fields.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, Message("system", (system,), "system"))
    by_marks = any(isinstance(entry, Mapping) and "from" in entry for entry in fields[turns])
    if pictures.used == 0 and pictures.listed and not by_marks:
        _put_first(messages, pictures)
    check_order(messages)
    _check_count(pictures, messages)
    return conversation_of(messages, _others(fields, {turns, pictures.name, "system"}))


def _reads_marks(entry: Any, pictures: Pictures) -> bool:
    """Whether `<image>` in a plain text is a place: where the row lists pictures, and always with from and value."""
    return pictures.name is not None or (isinstance(entry, Mapping) and "from" in entry)


def _message(entry: Any, where: str, pictures: Pictures, marks: bool) -> Message:
    if not isinstance(entry, Mapping):
        raise RowError("not a conversation", where, f"it is no message, but {entry!r:.60}", "write role and content")
    role = _role(entry, where)
    if entry.get("tool_calls") or entry.get("function_call"):
        wrong = "it calls a tool, and tools are not taught here"
        raise RowError("not a conversation", where, wrong, "take the row out, or write the call as words")
    name = "value" if "value" in entry else "content"
    content = entry.get(name)
    inner = f"{where}.{name}"
    if content is None:
        content = ""
    if isinstance(content, str):
        parts = _marked(content, pictures) if marks and role == "user" else [content]
    elif isinstance(content, list):
        parts = [_part(part, f"{inner}[{number}]", pictures) for number, part in enumerate(content)]
    else:
        raise RowError("not a conversation", inner, f"it is no text, but {content!r:.60}", "write a text or parts")
    if role != "user" and any(isinstance(part, PictureReference) for part in parts):
        wrong = f"the {role} shows a picture; a model can only look at pictures that users show"
        raise RowError("not a conversation", inner, wrong, "move the picture into a question")
    supervised = role != "assistant" or entry.get("weight") is None or bool(entry["weight"])
    return Message(role, tuple(part for part in parts if part != ""), inner, supervised)


def _role(entry: Mapping[str, Any], where: str) -> Role:
    name = "from" if "from" in entry else "role"
    said = entry.get(name)
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        known = " or ".join(get_args(Role)) if name == "role" else "human, gpt or system"
        raise RowError("unknown role", f"{where}.{name}", f"nobody is called {said!r:.60} here", f"write {known}")
    return role


def _marked(text: str, pictures: Pictures) -> list[str | PictureReference]:
    """The text cut at its marks, with a picture at each; space at its ends is layout around a mark."""
    first, *others = text.split(IMAGE_TOKEN)
    if not others:
        return [text]
    parts: list[str | PictureReference] = [first]
    for piece in others:
        picture = pictures.next()
        parts += [*([] if picture is None else [picture]), piece]
    texts = [number for number, part in enumerate(parts) if isinstance(part, str) and part.strip()]
    for number, part in enumerate(parts):
        if isinstance(part, str):
            kept = part if texts else ""
            kept = kept.lstrip() if texts and number <= texts[0] else kept
            parts[number] = kept.rstrip() if texts and number >= texts[-1] else kept
    return parts


def _part(part: Any, where: str, pictures: Pictures) -> str | PictureReference:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RowError("not a conversation", where, f"it is no part, but {part!r:.60}", "write text or image_url")
    kind = part.get("type")
    if kind in ("text", "input_text") or (kind is None and isinstance(part.get("text"), str)):
        if not isinstance(part.get("text"), str):
            raise RowError("not a conversation", f"{where}.text", "the text is missing", "write the words")
        return str(part["text"])
    if kind not in ("image_url", "image", "input_image", None):
        raise RowError("not a conversation", where, f"a part of type {kind!r:.40} is not taught", "take it out")
    for name in ("image_url", "image", "url", "path", "bytes"):
        if part.get(name) is not None:
            return _reference(part if name == "bytes" else part[name], f"{where}.{name}")
    picture = pictures.next()
    if picture is None and pictures.name is None:
        raise RowError("picture count", where, "it names no picture", "write image_url with a path or a data URL")
    return "" if picture is None else picture


def _reference(cell: Any, where: str) -> PictureReference:
    """The picture that a cell names or holds."""
    if isinstance(cell, Mapping):
        if isinstance(cell.get("bytes"), bytes):
            return PictureReference(where, cell.get("path"), cell["bytes"])
        cell = next((cell[name] for name in ("url", "path") if isinstance(cell.get(name), str)), None)
    if isinstance(cell, bytes):
        return PictureReference(where, None, cell)
    if not isinstance(cell, str) or not cell.strip():
        raise RowError("missing picture", where, f"it names no picture, but {cell!r:.40}", "write the picture's path")
    return PictureReference(where, cell.strip())


def _listed(fields: Mapping[str, Any], names: Sequence[str]) -> Pictures:
    for name, cell in _named(fields, names):
        if cell is None or cell == "" or cell == []:
            return Pictures(name)
        if isinstance(cell, list):
            return Pictures(name, [_reference(each, f"{name}[{number}]") for number, each in enumerate(cell)])
        return Pictures(name, [_reference(cell, name)])
    return Pictures(None)


def _named(fields: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The fields with one of `names`, in any case and in the order of `names`; those that say something come first."""
    by_name = {name.strip().lower(): name for name in fields}
    found = [(by_name[name], fields[by_name[name]]) for name in names if name in by_name]
    return iter(sorted(found, key=lambda pair: pair[1] in (None, "", [])))


def _put_first(messages: list[Message], pictures: Pictures) -> None:
    """All pictures before the words of the first question: rows of messages often list them and mark no place."""
    for number, message in enumerate(messages):
        if message.role == "user":
            pictures.used = len(pictures.listed)
            messages[number] = Message("user", (*pictures.listed, *message.parts), message.field)
            return


def _check_count(pictures: Pictures, messages: Sequence[Message]) -> None:
    if pictures.used == len(pictures.listed):
        return
    wrong = f"{IMAGE_TOKEN} in the questions: {pictures.used}; pictures in the row: {len(pictures.listed)}"
    if any(IMAGE_TOKEN in message.text for message in messages if message.role != "user"):
        wrong += f" ({IMAGE_TOKEN} that another says than the user is only words)"
    raise RowError("picture count", pictures.name or "row", wrong, MEND_COUNT)


def _from_texts(fields: Mapping[str, Any]) -> Conversation:
    """Rows of the Cauldron and FineVision: pictures, and a list of user and assistant texts."""
    pictures = _listed(fields, PICTURE_FIELDS[:2])
    messages: list[Message] = []
    for number, pair in enumerate(fields[TEXTS_FIELD]):
        where = f"{TEXTS_FIELD}[{number}]"
        if not isinstance(pair, Mapping) or not all(isinstance(pair.get(r), str) for r in ("user", "assistant")):
            raise RowError("not a conversation", where, f"it is {pair!r:.60}", "write user and assistant")
        messages.append(Message("user", (pair["user"],) if pair["user"] else (), f"{where}.user"))
        messages.append(Message("assistant", (pair["assistant"],), f"{where}.assistant"))
    _put_first(messages, pictures)
    return conversation_of(messages, _others(fields, {TEXTS_FIELD, pictures.name}))


def _from_question(fields: Mapping[str, Any]) -> Conversation:
    pictures = _listed(fields, PICTURE_FIELDS)
    (asked, question), (said, answer) = (next(_named(fields, names)) for names in (QUESTION_FIELDS, ANSWER_FIELDS))
    for name, cell in ((asked, question), (said, answer)):
        if cell is not None and not isinstance(cell, str | int | float):
            raise RowError("not a conversation", name, f"it is no text, but {cell!r:.60}", "write a text")
    texts = ["" if cell is None else str(cell) for cell in (question, answer)]
    messages = [
        Message("user", (*pictures.listed, *([texts[0]] if texts[0] else [])), asked),
        Message("assistant", (texts[1],) if texts[1] else (), said),
    ]
    if not texts[0].strip():
        raise RowError("empty message", asked, "the question is empty", "write the question or take out the row")
    return conversation_of(messages, _others(fields, {asked, said, pictures.name}))


def _others(fields: Mapping[str, Any], read: set[str | None]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in read and value is not None}
