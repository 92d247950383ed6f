"""One row of conversation data, typed: messages with references to pictures, checked as far as no picture is needed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from training.data.pictures import DataError

Role = Literal["system", "user", "assistant"]
Kind = Literal[
    "not JSON",
    "not a conversation",
    "unknown role",
    "wrong order",
    "empty message",
    "broken text",
    "picture count",
    "missing picture",
    "damaged picture",
    "remote picture",
    "nothing supervised",
    "too long",
    "refused by the template",
    # These are told and taught all the same.
    "duplicate",
    "in both files",
    "typed special token",
    "questions put together",
]
WARNINGS: frozenset[Kind] = frozenset(("duplicate", "in both files", "typed special token", "questions put together"))


@dataclass(frozen=True)
class Fault:
    """What is wrong with a field of a row, and the way out."""

    kind: Kind
    field: str
    wrong: str
    way_out: str

    @property
    def refuses(self) -> bool:
        """Whether the row cannot be taught; otherwise it is a warning."""
        return self.kind not in WARNINGS


class RowError(DataError):
    """A row that cannot be taught."""

    def __init__(self, kind: Kind, field: str, wrong: str, way_out: str) -> None:
        super().__init__(f"{field}: {wrong}; {way_out}")
        self.fault = Fault(kind, field, wrong, way_out)


@dataclass(frozen=True)
class PictureReference:
    """A picture of a row: what its file calls it (a path, a data URL, an https URL), or its bytes."""

    field: str  # where in the row it is named
    where: str | None = None
    content: bytes | None = None

    def __str__(self) -> str:
        if self.where is None:
            return f"{len(self.content or b''):,} bytes"
        return self.where if len(self.where) <= 120 else f"{self.where[:100]}..."


@dataclass(frozen=True)
class Message:
    """What one side said, with pictures where they stand."""

    role: Role
    parts: tuple[str | PictureReference, ...]
    field: str  # where in the row it is written
    supervised: bool = True  # of an answer: whether it is learned, or only read

    @property
    def text(self) -> str:
        """Its words, without its pictures."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> tuple[PictureReference, ...]:
        """Its pictures, in their order."""
        return tuple(part for part in self.parts if isinstance(part, PictureReference))


@dataclass(frozen=True)
class Conversation:
    """A row that can be taught: an optional system message, then questions and answers in turn."""

    messages: tuple[Message, ...]
    others: dict[str, Any] = field(default_factory=dict)  # what else the row says, such as its id
    remarks: tuple[Fault, ...] = ()

    @property
    def pictures(self) -> tuple[PictureReference, ...]:
        """All its pictures, in their order."""
        return tuple(picture for message in self.messages for picture in message.pictures)

    @property
    def turns(self) -> int:
        """How many answers it has."""
        return sum(message.role == "assistant" for message in self.messages)

    def chat_messages(self) -> tuple[dict[str, Any], ...]:
        """The messages in the form of `assistant.chat`, with a place for each picture."""
        return tuple(_chat_message(message) for message in self.messages)


def _chat_message(message: Message) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.parts]
    said: dict[str, Any] = {"role": message.role, "content": content}
    return said if message.supervised else said | {"supervised": False}


def conversation_of(messages: Sequence[Message], others: dict[str, Any]) -> Conversation:
    """The conversation that `messages` make. Neighbouring questions are put together, and a remark says so.

    Raises RowError where a message is empty, roles come in the wrong order, or nothing would be learned.
    """
    check_order(messages)
    for message in messages:
        _check_text(message)
    kept: list[Message] = []
    remarks: list[Fault] = []
    for message in messages:
        if kept and message.role == kept[-1].role == "user":
            kept[-1] = Message("user", _joined(kept[-1].parts, message.parts), kept[-1].field)
            wrong = "a second question without an answer between"
            remarks.append(Fault("questions put together", message.field, wrong, "check that no answer is lost"))
        else:
            kept.append(message)
    if not any(message.supervised for message in kept if message.role == "assistant"):
        wrong = "no answer is to be learned (every weight is 0)"
        raise RowError("nothing supervised", kept[-1].field, wrong, "give at least one answer the weight 1")
    return Conversation(tuple(kept), others, tuple(remarks))


def _joined(
    first: tuple[str | PictureReference, ...], second: tuple[str | PictureReference, ...]
) -> tuple[str | PictureReference, ...]:
    both = isinstance(first[-1], str) and isinstance(second[0], str)
    return (*first, "\n", *second) if both else (*first, *second)


def _check_text(message: Message) -> None:
    for part in message.parts:
        try:
            if isinstance(part, str):
                part.encode()
        except UnicodeEncodeError as error:
            wrong = f"it holds half a character (a lone surrogate, at place {error.start})"
            raise RowError("broken text", message.field, wrong, "write the text anew as UTF-8") from error
    if message.text.strip() or (message.pictures and message.role == "user"):
        return
    if message.role == "assistant":
        raise RowError("empty message", message.field, "the answer is empty", "write the answer or take out the row")
    raise RowError("empty message", message.field, f"the {message.role} says nothing", "write it or take it out")


def check_order(messages: Sequence[Message]) -> None:
    """Raises RowError unless there is a system message at most first, and each answer follows a question."""
    if not messages:
        raise RowError("empty message", "messages", "there is no message", "write a question and its answer")
    before: Role | None = None
    for message in messages:
        if message.role == "system" and before is not None:
            wrong = "a system message comes after others"
            raise RowError("wrong order", message.field, wrong, "let it be the first message")
        if message.role == "assistant" and before != "user":
            wrong = "two answers follow each other" if before == "assistant" else "an answer comes before any question"
            raise RowError("wrong order", message.field, wrong, "let question and answer take turns")
        before = message.role
    if messages[-1].role == "system":
        raise RowError("nothing supervised", messages[-1].field, "there is only a system message", "add the talk")
    if messages[-1].role == "user":
        asked_only = sum(message.role == "assistant" for message in messages) == 0
        kind: Kind = "nothing supervised" if asked_only else "wrong order"
        wrong = "there is no answer, so nothing is learned" if asked_only else "the last question has no answer"
        raise RowError(kind, messages[-1].field, wrong, "add the answer, or take out the question")
